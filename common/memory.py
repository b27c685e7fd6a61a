"""Memory of the process: what is freed goes back to the system."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
"""the number of mallopt's parameter in glibc"""
LARGE = 1 << 18
"""bytes of a block that gets pages of its own"""


def return_freed() -> bool:
    """Give blocks of LARGE bytes and more pages of their own from now on, which go back to the system when they are freed.

    glibc raises that limit to 32 MiB as it sees large blocks freed; the heap then keeps holes between what is still held, and a
    process that works through blocks of a model grows to nearly twice of what it needs. The price is that fresh pages are cleared
    again. Returns whether the C library has such a setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE) == 1
