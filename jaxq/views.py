"""Views of a quantized tensor: cast, transpose, reshape and slice without decoding.

Every array of a `QTensor` has the rank of the tensor it stands for, so a view of the
tensor is the same view of each array, with sizes divided by the block. What cannot be
said that way raises `ViewError` with the reason, and the caller dequantizes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxq.qtensor import QTensor

Group = tuple[tuple[int, ...], tuple[int, ...]]


class ViewError(Exception):
    """A view that packed codes cannot express; the message says why."""


def astype(q: "QTensor", dtype: DTypeLike) -> "QTensor":
    """Return the same tensor, standing for another float dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ViewError(f"cast to {jnp.dtype(dtype).name}, which is not a float dtype")
    return dataclasses.replace(q, dtype=jnp.dtype(dtype))


def transpose(q: "QTensor", permutation: Sequence[int]) -> "QTensor":
    """Permute the axes."""
    new_axis = list(permutation).index(q.axis % q.ndim) - q.ndim
    block = tuple(q.blocks[i] for i in permutation)
    q = map_fields(
        q, lambda a: jnp.transpose(a, permutation), nested=transpose_to(permutation)
    )
    return dataclasses.replace(q, axis=new_axis, block=block)


def transpose_to(permutation: Sequence[int]) -> "Callable[[QTensor], QTensor]":
    """Return the transposition as a function of a tensor."""
    return lambda q: transpose(q, permutation)


def plain_scales(q: "QTensor") -> "QTensor":
    """Return ``q`` with its scales decoded to float32 (they are few)."""
    if isinstance(q.scales, jax.Array) and q.spec.scale == "float32":
        return q
    spec = dataclasses.replace(q.spec, scale="float32")
    return dataclasses.replace(q, scales=q.scale_values(), spec=spec)


def slice_axis(
    q: "QTensor", axis: int, start: int, size: int, length: int | None = None
) -> "QTensor":
    """Return ``size`` elements from ``start`` along one axis (static bounds).

    Raises:
        ViewError: when a bound falls inside a block of scales or of packed codes.
    """
    length = q.shape[axis] if length is None else length
    if size == length:
        return q
    block, packed = q.blocks[axis], axis == q.axis % q.ndim
    whole = 1 < length == block or block > length
    ends = (start, start + size) if start + size < length else (start,)
    if not whole and any(end % block for end in ends):
        raise ViewError(f"slice {start}:{start + size} cuts a block of {block}")
    if packed and (q.padding or any(end % q.pack for end in ends)):
        raise ViewError(f"slice {start}:{start + size} cuts packed codes of {q.pack}")
    q = plain_scales(q)

    def part(a: jax.Array, per: int) -> jax.Array:
        last = -(-(start + size) // per)
        return jax.lax.slice_in_dim(a, start // per, last, axis=axis)

    codes_from, codes_to = (
        n * (q.spec.bits if packed else 8) // 8 for n in (start, start + size)
    )
    codes = jax.lax.slice_in_dim(q.codes, codes_from, codes_to, axis=axis)
    out = map_fields(
        q,
        lambda a: (
            a
            if a.shape[axis] == 1
            else part(a, length if whole else block if a.shape[axis] != length else 1)
        ),
    )
    blocks = tuple(size if i == axis and whole else b for i, b in enumerate(q.blocks))
    return dataclasses.replace(out, codes=codes, block=blocks)


def index_axis(
    q: "QTensor", axis: int, take: Callable[[jax.Array, int], jax.Array]
) -> "QTensor":
    """Apply ``take(array, axis)`` along an axis where every element has its own scale.

    Serves dynamic slices, reversals and gathers of a leading (layer, row) axis.

    Raises:
        ViewError: when the axis is packed, or a block spans several of its elements.
    """
    if axis == q.axis % q.ndim:
        raise ViewError("indexes the packed axis")
    if q.blocks[axis] > 1:
        raise ViewError(f"indexes an axis with blocks of {q.blocks[axis]}")
    q, length = plain_scales(q), q.shape[axis]
    return map_fields(q, lambda a: take(a, axis) if a.shape[axis] == length else a)


def reshape(q: "QTensor", shape: Sequence[int]) -> "QTensor":
    """Merge neighbouring axes or split an axis, where blocks and packing allow.

    Raises:
        ViewError: when axes are regrouped, or a block would not stay a block.
    """
    groups = list(axis_groups(q.shape, tuple(shape)))
    q = plain_scales(q)
    block: list[int] = []
    axis = q.axis % q.ndim
    new_axis = axis
    for old, new in groups:
        new_lengths = tuple(shape[i] for i in new)
        if axis in old:
            _check_packed(q, old, new_lengths)
            new_axis = new[-1] if new else -1
            # trailing axes of length one may follow the packed one
            wide = [i for i in new if shape[i] > 1]
            new_axis = wide[-1] if wide else new_axis
        block += _regroup_block(q, old, new_lengths)

    def arrays(a: jax.Array) -> jax.Array:
        out: list[int] = []
        for old, new in groups:
            lengths = tuple(shape[i] for i in new)
            out += _regroup_lengths(a.shape, q.shape, old, lengths, block[len(out) :])
        return a.reshape(out)

    codes_shape = list(shape)
    codes_shape[new_axis] = codes_shape[new_axis] * q.spec.bits // 8
    if q.padding:
        codes_shape[new_axis] = q.codes.shape[axis]
    codes = q.codes.reshape(codes_shape)
    out = map_fields(q, arrays, codes=codes)
    return dataclasses.replace(out, axis=new_axis - len(shape), block=tuple(block))


def map_fields(
    q: "QTensor",
    fn: Callable[[jax.Array], jax.Array],
    *,
    codes: jax.Array | None = None,
    nested: "Callable[[QTensor], QTensor] | None" = None,
) -> "QTensor":
    """Apply ``fn`` to every array of ``q`` (``codes`` replaces the codes when given)."""

    def one(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else fn(a)

    scales = q.scales
    if nested is not None and isinstance(scales, type(q)):
        scales = nested(scales)
    else:
        scales = one(scales)
    return dataclasses.replace(
        q,
        codes=fn(q.codes) if codes is None else codes,
        scales=scales,
        zeros=one(q.zeros),
        offset=one(q.offset),
        input_scale=one(q.input_scale),
        activation_scale=one(q.activation_scale),
    )


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


def _check_packed(q: "QTensor", old: Sequence[int], new: Sequence[int]) -> None:
    """Raise unless the packed axis may be merged or split as asked."""
    axis = q.axis % q.ndim
    wide = [i for i in old if q.shape[i] > 1]
    if wide and wide[-1] != axis and len(wide) > 1:
        raise ViewError("merges the packed axis with one behind it")
    inner = [n for n in new if n > 1]
    regrouped = len(wide) > 1 or len(inner) > 1
    if regrouped and q.padding:
        raise ViewError(f"reshapes an axis padded by {q.padding}")
    if regrouped and inner and inner[-1] % q.pack:
        raise ViewError(f"splits packed codes of {q.pack} into {inner[-1]}")
    if len(wide) > 1 and len(inner) > 1:
        raise ViewError("regroups the packed axis")


def _regroup_block(q: "QTensor", old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Return the block sizes of the new axes of one group."""
    lengths, blocks = [q.shape[i] for i in old], [q.blocks[i] for i in old]
    if tuple(lengths) == tuple(new):
        return list(blocks)
    merged, open_end = 1, True
    for length, size in zip(reversed(lengths), reversed(blocks), strict=True):
        if length == 1:
            continue
        if not open_end and size != 1:
            raise ViewError(f"merges axes of blocks {tuple(blocks)}")
        merged *= min(size, length)
        open_end = open_end and size >= length
    out: list[int] = []
    for length in reversed(new):
        part = min(merged, length)
        if merged > 1 and (length % part or (part < merged and merged % length)):
            raise ViewError(f"splits blocks of {merged} over axes {tuple(new)}")
        out.append(part)
        merged = max(merged // length, 1)
    return out[::-1]


def _regroup_lengths(
    array: Sequence[int],
    shape: Sequence[int],
    old: Sequence[int],
    new: Sequence[int],
    block: Sequence[int],
) -> list[int]:
    """Return an array's lengths along the new axes of one group."""
    have = [array[i] for i in old]
    if all(n == 1 for n in have):
        return [1] * len(new)
    if have == [shape[i] for i in old]:
        return list(new)
    grid = [-(-n // b) for n, b in zip(new, block, strict=False)]
    if math.prod(grid) != math.prod(have):
        raise ViewError(f"regroups scales of shape {tuple(have)}")
    return grid
