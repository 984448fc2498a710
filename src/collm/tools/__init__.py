"""Programs that are assistants: calculator, lookup table, dates, and functions of yours."""
