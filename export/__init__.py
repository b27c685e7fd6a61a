"""Artifacts for devices: one format a file."""
