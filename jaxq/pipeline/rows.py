"""Activations as rows of contracted elements, the way statistics want them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.explicit_axes import replicated
from jaxq.lift.product import Product
from jaxq.ops import Patches


class Layout(NamedTuple):
    """Which axes of an activation are what; the same for equal layers.

    Attributes:
        summed: the contracted axes, in the order of the weight's.
        batch: the axes that go with stacked weights, in the order of the weight's.
        groups: the number of experts whose rows follow each other (``ragged_dot``).
        patches: how rows come of the activation of a convolution, or None.
    """

    summed: tuple[int, ...]
    batch: tuple[int, ...]
    groups: int
    patches: Patches | None = None

    @classmethod
    def of(cls, product: Product) -> "Layout":
        """Return the layout of a product's activation."""
        return cls(product.summed, product.batch, product.groups, product.patches)

    @property
    def stacked(self) -> bool:
        """Whether every weight of a stack has rows of its own."""
        groups = 1 if self.patches is None else self.patches.groups
        return bool(self.batch) or self.groups > 0 or groups > 1

    def width(self, shape: Sequence[int]) -> int:
        """Return how many elements a row has, for an activation of a shape."""
        if self.patches is not None:
            return self.patches.width(shape)
        return math.prod(shape[axis] for axis in self.summed)

    def stack(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return ``(E,)`` where ``E`` weights have rows of their own, else ``()``."""
        if not self.stacked:
            return ()
        if self.patches is not None:
            return (self.patches.groups,)
        return (self.groups or math.prod(shape[axis] for axis in self.batch),)


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


def fold_patches(
    layout: Layout,
    add: Callable[..., Any],
    state: Any,
    arrays: Sequence[jax.Array],
    mask: jax.Array | None,
) -> Any:
    """Return ``add(state, counts, *rows)`` of a convolution's patches, in pieces.

    Args:
        layout: says which patches.
        add: from (state, ``bool[rows]`` or None, rows of each array) to the next state;
            rows are ``[rows, K]``, or ``[G, rows, K]`` of feature groups.
        state: before them.
        arrays: activations of one shape.
        mask: which output positions count: ``bool[batch, *outputs]`` or a part of its
            leading axes; or which elements of the activation do, by the one in the
            middle of a patch; another shape is not about this activation.
    """
    patches = layout.patches
    if patches is None:
        raise ValueError(f"{layout} is no convolution, and has no patches")

    def run(x: jax.Array, state: Any, mask: jax.Array | None, *more: jax.Array) -> Any:
        counts = _mask_patches(mask, x.shape, patches)
        return patches.fold(add, state, (x, *more), counts)

    first, *more = arrays
    return replicated(run, first, state, mask, *more)


def _mask_patches(
    mask: jax.Array | None, shape: Sequence[int], patches: Patches
) -> jax.Array | None:
    """Return the mask over output positions, ``bool[batch, *outputs]``."""
    if mask is None:
        return None
    lengths = (shape[patches.axes[0]], *patches.outputs(shape))
    counts = _mask_rows(mask, lengths)
    if counts is not None:
        return counts.reshape(lengths)
    inputs = tuple(shape[a] for a in (patches.axes[0], *patches.axes[2:]))
    if mask.shape != inputs[: mask.ndim]:
        return None
    for i in range(mask.ndim - 1):
        mask = jnp.take(mask, patches.middles(shape, i), axis=i + 1, mode="clip")
    more = (1,) * (len(lengths) - mask.ndim)
    return jnp.broadcast_to(mask.reshape(*mask.shape, *more), lengths)


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
