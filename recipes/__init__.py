"""Recipes: complete experiments, from public data to a measured collaboration."""
