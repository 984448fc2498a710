"""A small world of real facts and tiny models made on the spot, to see a collaboration at work in minutes."""
