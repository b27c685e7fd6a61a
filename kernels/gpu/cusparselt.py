"""The sparse tensor cores, through the cuSPARSELt that PyTorch binds: `torch._cslt_compress` and `torch._cslt_sparse_mm`.

cuSPARSELt stores a sparse matrix in an order of its own, which its compression makes on the device from the dense one. It takes float16,
bfloat16 and int8, the last with int32 sums; sizes that are multiples of 32 (int8) or 16, and tokens in multiples of 16 or 8 (the same numbers
as in torch.sparse.SparseSemiStructuredTensorCUSPARSELT): tokens are filled up with zeros.
"""

from __future__ import annotations

import torch

MULTIPLE = {torch.int8: 32, torch.float16: 16, torch.bfloat16: 16}
"""of rows and columns of the sparse matrix, by its type"""
TOKENS = 16
"""the number of tokens is a multiple of this"""


def missing() -> str | None:
    """Why this PyTorch cannot use sparse tensor cores; None where it can."""
    if not torch.backends.cusparselt.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return "this PyTorch is built without cuSPARSELt"
    return None


def takes(dtype: torch.dtype, out: int, columns: int) -> bool:
    """Whether a matrix (out, columns) has sizes that it knows."""
    return dtype in MULTIPLE and out % MULTIPLE[dtype] == 0 and columns % MULTIPLE[dtype] == 0


def compress(weight: torch.Tensor) -> torch.Tensor:
    """The form that cuSPARSELt takes of a dense weight (out, columns) that has at most two values in each group of four."""
    return torch._cslt_compress(weight.contiguous())  # pyright: ignore[reportPrivateImportUsage]


def product(x: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """The product x W^T (tokens, out) of x (tokens, columns): int32 for int8, else the type of x."""
    tokens = x.shape[0]
    if tokens % TOKENS:
        x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TOKENS))
    kind = torch.int32 if x.dtype == torch.int8 else None
    # the dense operand is (columns, tokens), a transposed view; the result is written (tokens, out)
    y = torch._cslt_sparse_mm(compressed, x.contiguous().t(), out_dtype=kind, transpose_result=True)  # pyright: ignore[reportPrivateImportUsage]
    return y[:tokens]
