"""Tools, the assistants that are programs: calculator, lookup table and user functions."""
