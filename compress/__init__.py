"""Compression: models, passes, recipes, and every method as one file."""
