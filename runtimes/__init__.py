"""Running and measuring artifacts: one runtime a file."""
