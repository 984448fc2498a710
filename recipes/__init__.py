"""Recipes: whole ways from public data to a measured collaboration."""
