"""The end of every linear kernel: y = activation(z + bias) * factor + residual, in float32 (kernels/gpu/op.py)."""

import triton
import triton.language as tl


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation by its name; '' is none."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 1 + tanh(u) = 2 sigmoid(2 u)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, row, column, rows, columns, ACTIVATION: tl.constexpr):
    """Finish and write a tile z float32 of y (rows, columns), contiguous.

    `row` and `column` are index tensors that broadcast to the tile's shape, either way round: (BM, 1) and (1, BN), or (1, BM) and
    (BN, 1) for a transposed tile. Absent pointers are None.
    """
    inside = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
    z = activated(z, ACTIVATION)
    if factor_ptr is not None:
        z *= tl.load(factor_ptr + at, inside, 0.0).to(tl.float32)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), inside)
