"""Views of a quantized tensor: cast, transpose, reshape and slice without decoding.

Every array of a `QTensor` has the rank of the tensor it stands for, so a view of the
tensor is the same view of each array, with sizes divided by the block. What cannot be
said that way raises `ViewError` with the reason, and the caller dequantizes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxq.blocks import grid_shape
from jaxq.qtensor import QTensor
from jaxq.relayout import PLANAR, relayout

Group = tuple[tuple[int, ...], tuple[int, ...]]


class ViewError(Exception):
    """A view that packed codes cannot express; the message says why."""


def astype(q: QTensor, dtype: DTypeLike) -> QTensor:
    """Return the same tensor, standing for another float dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ViewError(f"cast to {jnp.dtype(dtype).name}, which is not a float dtype")
    return dataclasses.replace(q, dtype=jnp.dtype(dtype))


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor:
    """Permute the axes."""
    q = unplaced(relayout(q, PLANAR))
    new_axis = list(permutation).index(q.axis % q.ndim) - q.ndim
    block = tuple(q.blocks[i] for i in permutation)
    scales = q.scales
    scales = transpose(scales, permutation) if isinstance(scales, QTensor) else None
    q = map_fields(q, lambda a: jnp.transpose(a, permutation), scales=scales)
    return dataclasses.replace(q, axis=new_axis, block=block)


def unplaced(q: QTensor) -> QTensor:
    """Return ``q`` without what it says of a mesh: its last axes will be others."""
    return q if q.sharding is None else dataclasses.replace(q, sharding=None)


def plain_scales(q: QTensor) -> QTensor:
    """Return ``q`` with its scales decoded to float32 (they are few)."""
    if isinstance(q.scales, jax.Array) and q.spec.scale == "float32":
        return q
    spec = dataclasses.replace(q.spec, scale="float32")
    return dataclasses.replace(q, scales=q.scale_values(), spec=spec)


def slice_axis(
    q: QTensor, axis: int, start: int, size: int, length: int | None = None
) -> QTensor:
    """Return ``size`` elements from ``start`` along one axis (static bounds).

    Raises:
        ViewError: when a bound falls inside a block of scales or of packed codes.
    """
    length = q.shape[axis] if length is None else length
    if size == length:
        return q
    block, packed = q.blocks[axis], axis == q.axis % q.ndim
    if packed and q.input_index is not None:
        raise ViewError("slices channels that an input index picks")
    if packed and q.spec.binary:
        raise ViewError("slices channels of which every bit has a scale")
    whole = 1 < length == block or block > length
    ends = (start, start + size) if start + size < length else (start,)
    if not whole and any(end % block for end in ends):
        raise ViewError(f"slice {start}:{start + size} cuts a block of {block}")
    if packed and (q.padding or any(end % q.pack for end in ends)):
        raise ViewError(f"slice {start}:{start + size} cuts packed codes of {q.pack}")
    q = plain_scales(q if axis < q.ndim - 2 else unplaced(relayout(q, PLANAR)))

    def part(a: jax.Array) -> jax.Array:
        if a.shape[axis] == 1:
            return a
        # one value per element (an input scale), or one per block
        per = 1 if a.shape[axis] == length else block
        last = -(-(start + size) // per)
        return jax.lax.slice_in_dim(a, start // per, last, axis=axis)

    bits = q.spec.bits if packed else 8
    first, last = start * bits // 8, (start + size) * bits // 8
    codes = jax.lax.slice_in_dim(q.codes, first, last, axis=axis)
    out = map_fields(q, part, codes=codes)
    blocks = tuple(size if i == axis and whole else b for i, b in enumerate(q.blocks))
    return dataclasses.replace(out, block=blocks)


def index_axis(
    q: QTensor, axis: int, take: Callable[[jax.Array, int], jax.Array]
) -> QTensor:
    """Apply ``take(array, axis)`` along an axis where every element has its own scale.

    Serves dynamic slices, reversals and gathers of a leading (layer, row) axis.

    Raises:
        ViewError: when the axis is packed, or a block spans several of its elements.
    """
    if axis == q.axis % q.ndim:
        raise ViewError("indexes the packed axis")
    q = q if axis < q.ndim - 2 else unplaced(relayout(q, PLANAR))
    if q.blocks[axis] > 1:
        raise ViewError(f"indexes an axis with blocks of {q.blocks[axis]}")
    q, length = plain_scales(q), q.shape[axis]
    return map_fields(q, lambda a: take(a, axis) if a.shape[axis] == length else a)


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring axes that become other neighbouring axes of the same total length.

    Attributes:
        old: the old axes.
        lengths: their lengths.
        blocks: their block sizes.
        new: the lengths of the new axes.
        source: for each new axis the old one that it is, as an index into ``old``, or
            None (a new axis of length one); None when axes are merged or split.
        new_blocks: the block sizes of the new axes.
    """

    old: tuple[int, ...]
    lengths: tuple[int, ...]
    blocks: tuple[int, ...]
    new: tuple[int, ...]
    source: tuple[int | None, ...] | None
    new_blocks: tuple[int, ...]

    def array_lengths(self, array: Sequence[int]) -> tuple[int, ...]:
        """Return an array's lengths along the new axes, from its lengths of all axes.

        Raises:
            ViewError: when the array varies along only some of the merged axes.
        """
        have = tuple(array[i] for i in self.old)
        if self.source is not None:
            return tuple(1 if i is None else have[i] for i in self.source)
        if all(n == 1 for n in have):
            return (1,) * len(self.new)
        if have == self.lengths:
            return self.new
        if have == grid_shape(self.lengths, self.blocks):
            return grid_shape(self.new, self.new_blocks)
        raise ViewError(f"merges axes along some of which {have} values are shared")


def reshape(q: QTensor, shape: Sequence[int]) -> QTensor:
    """Merge neighbouring axes or split an axis, where blocks and packing allow.

    Raises:
        ViewError: when a block or packed codes would not stay together.
    """
    q, packed = unplaced(relayout(q, PLANAR)), q.axis % q.ndim
    runs = [_run(q, *group, tuple(shape)) for group in axis_groups(q.shape, shape)]
    changed = [run for run in runs if run.source is None and packed in run.old]
    if q.spec.binary and changed:
        raise ViewError("merges or splits channels of which every bit has a scale")
    if q.rows is not None:
        return _reshape_stored(q, runs, shape)
    q = plain_scales(q)

    def arrays(a: jax.Array) -> jax.Array:
        return a.reshape([n for run in runs for n in run.array_lengths(a.shape)])

    lengths, axis = list(shape), 0
    for run in runs:
        if packed in run.old:
            axis += _packed_place(q, run)
            break
        axis += len(run.new)
    bytes_in = q.codes.shape[packed]
    lengths[axis] = bytes_in if q.padding else shape[axis] * q.spec.bits // 8
    out = map_fields(q, arrays, codes=q.codes.reshape(lengths))
    block = tuple(n for run in runs for n in run.new_blocks)
    return dataclasses.replace(out, axis=axis - len(lengths), block=block)


def _reshape_stored(q: QTensor, runs: "Sequence[Run]", shape: Sequence[int]) -> QTensor:
    """Reshape a tensor whose stored rows an index picks: their axis stays as it is."""
    packed, place = q.axis % q.ndim, 0
    for run in runs:
        if packed in run.old:
            if run.source is None:
                raise ViewError("merges or splits channels that an input index picks")
            place += run.source.index(run.old.index(packed))
            break
        place += len(run.new)
    stored = list(shape)
    stored[place] = q.stored_shape[packed]
    whole = reshape(dataclasses.replace(q, rows=None), stored)
    if whole.axis % whole.ndim != place:
        raise ViewError("puts a single stored row among axes of length one")
    return dataclasses.replace(whole, rows=q.rows)


def _run(
    q: QTensor, old: Sequence[int], new: Sequence[int], shape: Sequence[int]
) -> Run:
    """Return how the axes ``old`` become the axes ``new`` of ``shape``."""
    lengths = tuple(q.shape[i] for i in old)
    blocks = tuple(q.blocks[i] for i in old)
    new_lengths = tuple(shape[i] for i in new)
    source = _sources(lengths, new_lengths, q.axis % q.ndim - old[0] if old else -1)
    if source is None:
        new_blocks = _split_block(new_lengths, _merged_block(lengths, blocks))
    else:
        new_blocks = tuple(1 if i is None else blocks[i] for i in source)
    return Run(tuple(old), lengths, blocks, new_lengths, source, new_blocks)


def _sources(
    old: tuple[int, ...], new: tuple[int, ...], packed: int
) -> tuple[int | None, ...] | None:
    """Return which old axis each new axis is, when they differ by axes of length one.

    The packed axis keeps its place among the others even when its own length is one.
    """
    kept = [i for i, n in enumerate(old) if n > 1 or i == packed]
    out: list[int | None] = []
    for n in new:
        found = bool(kept) and old[kept[0]] == n
        out.append(kept.pop(0) if found else None)
    same = not kept and all(n == 1 for n, i in zip(new, out, strict=True) if i is None)
    return tuple(out) if same else None


def _packed_place(q: QTensor, run: Run) -> int:
    """Return which new axis of the run is the packed one."""
    packed = run.old.index(q.axis % q.ndim)
    if run.source is not None:
        return run.source.index(packed)
    if q.padding:
        raise ViewError(f"merges or splits the packed axis, padded by {q.padding}")
    if packed != max((i for i, n in enumerate(run.lengths) if n > 1), default=-1):
        raise ViewError("merges the packed axis with one behind it")
    place = max(i for i, n in enumerate(run.new) if n > 1)
    if run.new[place] % q.pack:
        raise ViewError(f"splits packed codes of {q.pack} into {run.new[place]}")
    return place


def _merged_block(lengths: Sequence[int], blocks: Sequence[int]) -> int:
    """Return how many consecutive elements of the merged axes share a scale."""
    wide = [(n, min(b, n)) for n, b in zip(lengths, blocks, strict=True) if n > 1]
    merged, whole = 1, True
    for i, (length, block) in reversed(list(enumerate(wide))):
        ragged = i > 0 and length % block
        if ragged or not (whole or block == 1):
            raise ViewError(f"merges axes of blocks {tuple(blocks)}")
        merged *= block
        whole = whole and block == length
    return merged


def _split_block(lengths: Sequence[int], merged: int) -> tuple[int, ...]:
    """Return the block sizes along axes into which blocks of ``merged`` are split."""
    out: list[int] = []
    for i, length in reversed(list(enumerate(lengths))):
        block = min(merged, length)
        outermost = all(n == 1 for n in lengths[:i])
        if merged % block or (length % block and not outermost):
            raise ViewError(f"splits blocks of {merged} over axes {tuple(lengths)}")
        out.append(block)
        merged //= block
    return tuple(out[::-1])


def map_fields(
    q: QTensor,
    fn: Callable[[jax.Array], jax.Array],
    *,
    codes: jax.Array | None = None,
    scales: jax.Array | QTensor | None = None,
) -> QTensor:
    """Apply ``fn`` to every array of ``q``, where none is given in its place.

    Scales that are a `QTensor` must be given, or made plain before.
    """

    def one(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else fn(a)

    if scales is None:
        assert not isinstance(q.scales, QTensor)
        scales = fn(q.scales)
    return dataclasses.replace(
        q,
        codes=fn(q.codes) if codes is None else codes,
        scales=scales,
        zeros=one(q.zeros),
        offset=one(q.offset),
        input_scale=one(q.input_scale),
        input_index=one(q.input_index),
        activation_scale=one(q.activation_scale),
        activation_zero=one(q.activation_zero),
    )


def with_input_index(q: QTensor, index: jax.Array, rows: int) -> QTensor:
    """Return the matrix whose channel k is the sum of the rows of ``q`` with index k.

    ``x @ result = x[..., index] @ q``. A tensor that has an index already is composed
    with the new one. An input scale stays that of the stored rows.

    Args:
        q: a quantized matrix, or a stack of them along leading axes.
        index: int ``[rows of q]``, or one such row per matrix of the stack.
        rows: how many channels the result has; every index is below it.

    Raises:
        ValueError: when the index does not fit the matrix, or is out of range.

    Example:
        >>> from jaxq.quantize import quantize
        >>> from jaxq.spec import QuantSpec
        >>> q = quantize(jnp.asarray([[1.0], [2.0], [4.0]]), QuantSpec("int8", 1))
        >>> with_input_index(q, jnp.asarray([0, 1, 0]), 2).dequantize().tolist()
        [[5.0], [2.0]]
    """
    if q.ndim < 2 or q.axis < -2:
        raise ValueError(
            f"an input index picks the rows of a matrix, and {q!r} packs axis {q.axis} "
            f"of {q.ndim}: give a matrix, stacked along leading axes if there are many"
        )
    stack, length = q.shape[:-2], q.shape[q.axis]
    shape = jnp.shape(index)
    whole = jnp.issubdtype(jnp.result_type(index), jnp.integer)
    if not whole or shape not in ((length,), (*stack, length)):
        raise ValueError(
            f"an index {jnp.result_type(index)}{list(shape)} does not fit {q!r}: give "
            f"an integer for each of its {length} rows"
        )
    traced = isinstance(index, jax.core.Tracer)
    if not traced and (np.min(index) < 0 or np.max(index) >= rows):
        raise ValueError(
            f"rows={rows}, but the index names channels {np.min(index)} to "
            f"{np.max(index)}: give indices from 0 to {rows - 1}"
        )
    index = jnp.asarray(index, jnp.int32).reshape(
        (1,) * (q.ndim - 1 - len(shape)) + shape
    )
    index = jnp.expand_dims(index, -1 if q.axis == -2 else -2)
    if q.input_index is not None:
        many = (*stack, *index.shape[-2:])
        old = jnp.broadcast_to(q.input_index, (*stack, *q.input_index.shape[-2:]))
        index = jnp.take_along_axis(jnp.broadcast_to(index, many), old, axis=q.axis)
    return dataclasses.replace(q, input_index=index, rows=rows)


def axis_groups(old: Sequence[int], new: Sequence[int]) -> Iterator[Group]:
    """Pair runs of old axes with runs of new axes of the same total length.

    Example:
        >>> list(axis_groups((6, 4), (2, 3, 4)))
        [((0,), (0, 1)), ((1,), (2,))]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(a), j + len(b)
        while math.prod(old[k] for k in a) != math.prod(new[k] for k in b):
            if math.prod(old[k] for k in a) < math.prod(new[k] for k in b):
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        yield tuple(a), tuple(b)
