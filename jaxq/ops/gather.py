"""Rows of a packed table: embeddings, and layers picked from a stack."""

import dataclasses
from collections.abc import Callable, Sequence, Set

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.qtensor import QTensor
from jaxq.relayout import PLANAR, relayout
from jaxq.views import ViewError, map_fields, plain_scales


def gather(
    w: QTensor,
    indices: jax.Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    bind: Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array],
) -> QTensor:
    """Gather whole rows of codes, scales and zeros: ``q[i]`` without decoding the rest.

    Args:
        w: the table.
        indices: start indices, as `jax.lax.gather` takes them.
        dimension_numbers: as there.
        slice_sizes: as there, for the logical shape.
        bind: performs the gather on one array with the slice sizes given.

    Returns:
        The gathered rows, still quantized.

    Raises:
        ViewError: when the gather cuts a block or the packed axis.
    """
    batching = set(getattr(dimension_numbers, "operand_batching_dims", ()))
    dropped = set(dimension_numbers.collapsed_slice_dims) | batching
    # an axis taken whole is not picked from: vmap gives it a start index of 0
    picked = (
        axis
        for axis in dimension_numbers.start_index_map
        if axis in dropped or slice_sizes[axis] != w.shape[axis]
    )
    indexed = {*picked, *batching}
    _check_blocks(w, indexed, slice_sizes)
    if any(axis >= w.ndim - 2 for axis in indexed):
        w = relayout(w, PLANAR)
    if isinstance(w.scales, QTensor):
        w = plain_scales(w)
    if w.rows is not None:
        slice_sizes = list(slice_sizes)
        slice_sizes[w.axis] = w.stored_shape[w.axis]

    def rows(a: jax.Array) -> jax.Array:
        shape, sizes = list(a.shape), list(slice_sizes)
        for axis, length in enumerate(w.stored_shape):
            if axis in indexed:
                shape[axis] = length
            else:
                sizes[axis] = a.shape[axis]
        return bind(jnp.broadcast_to(a, shape), indices, tuple(sizes))

    kept = [axis for axis in range(w.ndim) if axis not in dropped]
    out = map_fields(w, rows)
    axis, block = 0, [1] * out.ndim
    for place, source in zip(dimension_numbers.offset_dims, kept, strict=True):
        block[place] = min(w.blocks[source], slice_sizes[source])
        if source == w.axis % w.ndim:
            axis = place - out.ndim
    return dataclasses.replace(out, axis=axis, block=tuple(block))


def _check_blocks(w: QTensor, indexed: Set[int], slice_sizes: Sequence[int]) -> None:
    """Raise unless whole rows are taken, each with scales of its own."""
    for axis, (size, length) in enumerate(zip(slice_sizes, w.shape, strict=True)):
        if axis not in indexed and size != length:
            raise ViewError(f"takes {size} of {length} along axis {axis}")
        if axis in indexed and (axis == w.axis % w.ndim or w.blocks[axis] > 1):
            raise ViewError(f"indexes axis {axis}, along which codes share scales")
