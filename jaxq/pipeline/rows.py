"""Activations as rows of contracted elements, the way statistics want them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.lift.product import Product


class Layout(NamedTuple):
    """Which axes of an activation are what; the same for equal layers.

    Attributes:
        summed: the contracted axes, in the order of the weight's.
        batch: the axes that go with stacked weights, in the order of the weight's.
        groups: the number of experts whose rows follow each other (``ragged_dot``).
    """

    summed: tuple[int, ...]
    batch: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, product: Product) -> "Layout":
        """Return the layout of a product's activation."""
        return cls(product.summed, product.batch, product.groups)

    @property
    def stacked(self) -> bool:
        """Whether every weight of a stack has rows of its own."""
        return bool(self.batch) or self.groups > 0


def to_rows(
    x: jax.Array,
    layout: Layout,
    mask: jax.Array | None = None,
    sizes: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Return ``x`` as ``[rows, K]`` or ``[E, rows, K]``, and which rows count.

    Args:
        x: an activation.
        layout: its axes.
        mask: bool, of the shape of the activation's leading free axes (``[batch,
            tokens]``), or flattened; another shape is not about this activation.
        sizes: ``int[E]``, how many rows each expert gets (``ragged_dot``).

    Returns:
        The rows, and ``bool[rows]`` or ``bool[E, rows]``, or None: all count. An
        expert's rows of zeros are places that no token took, and do not count.
    """
    kept = (*layout.batch, *layout.summed)
    free = tuple(i for i in range(x.ndim) if i not in kept)
    stack = tuple(x.shape[i] for i in layout.batch)
    lengths = tuple(x.shape[i] for i in free)
    width = math.prod(x.shape[i] for i in layout.summed)
    rows = x.transpose((*layout.batch, *free, *layout.summed))
    rows = rows.reshape(*((math.prod(stack),) if stack else ()), -1, width)
    counts = _mask_rows(mask, lengths)
    if layout.groups and sizes is not None:
        expert = jnp.searchsorted(
            jnp.cumsum(sizes), jnp.arange(len(rows)), side="right"
        )
        owns = expert[None] == jnp.arange(layout.groups)[:, None]
        counts = owns if counts is None else owns & counts
        rows = jnp.broadcast_to(rows[None], (layout.groups, *rows.shape))
    elif stack:
        used = jnp.any(rows != 0, axis=-1)
        counts = used if counts is None else used & counts
    return rows, counts


def _mask_rows(mask: jax.Array | None, lengths: tuple[int, ...]) -> jax.Array | None:
    """Return the mask over flattened free axes, or None when it is of another shape."""
    if mask is None or not lengths:
        return None
    size = math.prod(lengths)
    fits = mask.shape == lengths[: mask.ndim] or mask.size == size
    if not fits:
        return None
    repeats = size // mask.size
    return jnp.repeat(mask.reshape(-1), repeats) if repeats > 1 else mask.reshape(-1)
