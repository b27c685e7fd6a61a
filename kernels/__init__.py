"""Low-bit ops: what each one computes (the reference), how its data is packed, and its fast versions."""
