"""Low-bit ops: what each one computes (the reference), how its data is packed, and its fast versions.

`<op>.py` holds one `Op` (op.py): its arithmetic in numpy on top of integer.py, and the C call for a node. `c/<op>.c` is the
portable kernel, `c/planish.h` the layer structs and the shared arithmetic. A version for an instruction set stands beside the
portable one as `c/<op>_<feature>.c` (dsp: SMLAD of Cortex-M4 and later; mve: vectors of Cortex-M55) with the same layer
struct and entry point, and must give the same bits: tests/kernels compares every file with the reference.
"""
