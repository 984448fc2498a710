"""Tools, the assistants that are programs: calculator, lookup table, dates and user functions."""
