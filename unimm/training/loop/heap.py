"""Memory that the allocator keeps."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function, or None if the C library has none."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


def release_heap() -> None:
    """Return freed CPU memory to the system.

    glibc keeps what it cannot reuse: a run whose tensors have other sizes at every step grows without a leak. Does
    nothing with other C libraries.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)
