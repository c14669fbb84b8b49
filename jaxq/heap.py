"""Freed memory goes back to the system, so that every step begins with as little."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")
# How many bytes of arrays may be made before the heap is emptied of what made them.
EVERY = 8 * 2**20


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


def one_at_a_time(trees: Iterable[T]) -> Iterator[T]:
    """Yield trees of arrays, each when it is ready.

    JAX copies arrays from the host later, and holds their sources until then; those of
    many trees would pile up. What made them is given back every 8 MiB.

    Args:
        trees: made when they are asked for; what is no array in them passes through.

    Example:
        >>> import jax.numpy as jnp
        >>> sum(int(a.sum()) for a in one_at_a_time(jnp.ones(n) for n in (2, 3)))
        5
    """
    made = 0
    for tree in trees:
        jax.block_until_ready(tree)
        made += sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(tree))
        if made >= EVERY:
            made = 0
            give_back()
        yield tree
        del tree  # or it would be held while the next is made


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's ``malloc_trim``, or None where there is another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
