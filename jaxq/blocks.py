"""Which elements share a scale: from a spec's granularity to a block size per axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.spec import Block


def block_shape(
    block: Block,
    shape: Sequence[int],
    contracting: Sequence[int],
    stacked: Sequence[int] = (),
) -> tuple[int, ...]:
    """Return the block size along each axis of a weight.

    Args:
        block: a granularity, as in `QuantSpec.block`.
        shape: the weight's shape.
        contracting: the axes a matrix product sums over (non-negative).
        stacked: axes that enumerate independent weights (layers, experts).

    Raises:
        ValueError: when a tile meets a weight without a free axis.

    Example:
        >>> block_shape(64, (512, 256), contracting=(0,))
        (64, 1)
        >>> block_shape("tensor", (8, 512, 256), contracting=(1,), stacked=(0,))
        (1, 512, 256)
    """
    sizes = [1] * len(shape)
    if block == "tensor":
        return tuple(1 if i in stacked else n for i, n in enumerate(shape))
    if isinstance(block, str):
        for axis in contracting:
            sizes[axis] = shape[axis]
        return tuple(sizes)
    group = block if isinstance(block, int) else block[0]
    for axis in sorted(contracting, reverse=True):
        sizes[axis] = min(group, shape[axis])
        group = max(group // max(shape[axis], 1), 1)
    if isinstance(block, tuple):
        free = [i for i in range(len(shape)) if i not in (*contracting, *stacked)]
        if not free:
            raise ValueError(
                f"a tile {block} needs an axis that is not contracted, but the weight "
                f"of shape {tuple(shape)} contracts {tuple(contracting)}"
            )
        sizes[free[-1]] = min(block[1], shape[free[-1]])
    return tuple(sizes)


def grid_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return how many blocks lie along each axis; a ragged last block counts."""
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def to_blocks(x: jax.Array, block: Sequence[int], fill: float = 0.0) -> jax.Array:
    """Reshape ``x`` to ``[n0, b0, n1, b1, ...]``; ``fill`` completes ragged blocks."""
    grid = grid_shape(x.shape, block)
    pad = [(0, n * b - s) for n, b, s in zip(grid, block, x.shape, strict=True)]
    if any(after for _, after in pad):
        x = jnp.pad(x, pad, constant_values=jnp.asarray(fill, x.dtype))
    return x.reshape([n for pair in zip(grid, block, strict=True) for n in pair])


def block_axes(rank: int) -> tuple[int, ...]:
    """Return the within-block axes of `to_blocks`' result: 1, 3, 5, ..."""
    return tuple(range(1, 2 * rank, 2))


def spread(values: jax.Array, block: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Repeat one value per block over the block's elements, to ``shape``.

    An axis along which ``values`` has length 1 is left to broadcasting.
    """
    for axis, (size, length) in enumerate(zip(block, shape, strict=True)):
        if size > 1 and values.shape[axis] > 1:
            values = jnp.repeat(values, size, axis=axis)
            if values.shape[axis] != length:
                values = jnp.take(values, jnp.arange(length), axis=axis)
    return values
