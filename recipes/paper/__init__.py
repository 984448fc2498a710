"""Runs in the sizes of the paper (arXiv 2403.03870): configurations, and what they cost."""
