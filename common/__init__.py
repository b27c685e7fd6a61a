"""What every stage may use: errors, plug-in discovery, files, progress. Imports nothing else of planish."""
