"""Rows of a packed table: embeddings, and layers picked from a stack."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.qtensor import QTensor
from jaxq.views import ViewError, plain_scales


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
    indexed = set(dimension_numbers.start_index_map)
    batching = set(getattr(dimension_numbers, "operand_batching_dims", ()))
    for axis, (size, length) in enumerate(zip(slice_sizes, w.shape, strict=True)):
        picked = axis in indexed | batching
        if not picked and size != length:
            raise ViewError(f"takes {size} of {length} along axis {axis}")
        if picked and (axis == w.axis % w.ndim or w.blocks[axis] > 1):
            raise ViewError(f"indexes axis {axis}, along which codes share scales")
    if isinstance(w.scales, QTensor):
        w = plain_scales(w)

    def rows(a: jax.Array | None) -> jax.Array | None:
        if a is None:
            return None
        shape = list(a.shape)
        sizes = list(slice_sizes)
        for axis, length in enumerate(w.shape):
            if axis in indexed | batching:
                shape[axis] = length
            else:
                sizes[axis] = a.shape[axis]
        return bind(jnp.broadcast_to(a, shape), indices, tuple(sizes))

    collapsed = set(dimension_numbers.collapsed_slice_dims) | batching
    kept = [axis for axis in range(w.ndim) if axis not in collapsed]
    arrays = {name: rows(getattr(w, name)) for name in _ARRAYS}
    codes = arrays["codes"]
    assert codes is not None
    axis, block = 0, [1] * codes.ndim
    for place, source in zip(dimension_numbers.offset_dims, kept, strict=True):
        block[place] = min(w.blocks[source], slice_sizes[source])
        if source == w.axis % w.ndim:
            axis = place - codes.ndim
    return dataclasses.replace(w, **arrays, axis=axis, block=tuple(block))


_ARRAYS = ("codes", "scales", "zeros", "offset", "input_scale", "activation_scale")
