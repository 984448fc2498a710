"""Runs at the paper's sizes (arXiv 2403.03870): configurations and cost estimates."""
