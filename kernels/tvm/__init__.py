"""Fused low-bit ops in TVM: one file an op with its Relax lowering. TVM is imported by whoever calls them, not here."""
