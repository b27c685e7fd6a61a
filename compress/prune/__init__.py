"""Pruning: one method a file."""
