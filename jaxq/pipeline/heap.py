"""Freed memory goes back to the system, so that every block begins with as little."""

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Return the pages of freed arrays to the system, where the C library can be asked.

    glibc keeps what was freed below 32 MiB and reuses it in pieces that the next arrays
    rarely fit; a run over many blocks keeps twice what it uses, and its peak grows from
    block to block. Other C libraries are left alone.

    Example:
        >>> give_back()
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's ``malloc_trim``, or None where there is another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
