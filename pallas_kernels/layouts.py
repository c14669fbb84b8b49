"""How codes of 1 to 8 bits lie in bytes: planar packing in blocks of rows.

A code of ``bits`` bits is cut into *planes* of 4, 2 and 1 bits (3 = 2 + 1, the low bits
first), because those divide a byte: three bits cost three bits. Rows are packed in
blocks of ``pack`` along one axis. In a plane of width ``w`` a byte holds ``n = 8 / w``
fields, and field ``i`` of byte ``r`` is row ``i * pack / n + r`` of its block::

    4 bits, pack = 128:   byte r  =  row r  |  row (64 + r) << 4          r = 0..63
    3 bits, pack = 128:   32 bytes of 2-bit fields, then 16 bytes of 1-bit fields

So a field is a contiguous range of rows: unpacking is a shift and a mask of whole
vectors, never a permutation, and a matrix product can consume the fields one by one.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_PACK = 128


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes of a code, low bits first: ``3 -> (2, 1)``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie in 1..8, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack_block(length: int, bits: int, group: int) -> int:
    """Return the rows per packing block.

    The largest power of two up to 128 that divides the axis and, where possible, the
    group: then no block holds rows of two scales.

    Args:
        length: rows of the axis, padding included.
        bits: bits per code.
        group: rows per scale.

    Raises:
        ValueError: when the rows do not fill bytes.
    """
    if bits == 8:
        return 1
    if length % 8:
        raise ValueError(
            f"{length} rows of {bits}-bit codes do not fill bytes; pad to a multiple "
            f"of 8 ({-(-length // 8) * 8})"
        )
    block = math.gcd(length, MAX_PACK)
    return block if group >= length else max(math.gcd(block, group), 8)


def pack(codes: jax.Array, bits: int, axis: int, block: int) -> jax.Array:
    """Pack ``codes`` along ``axis`` into bytes.

    Args:
        codes: uint8, each below ``2**bits``; ``codes.shape[axis]`` is a multiple of
            ``block``.
        bits: bits per code, 1..8.
        axis: the axis that shrinks by ``bits / 8``.
        block: rows per packing block, a multiple of 8 (any value for 8 bits).

    Returns:
        uint8 of the same rank.

    Example:
        >>> import jax.numpy as jnp
        >>> pack(jnp.arange(8, dtype=jnp.uint8), bits=4, axis=0, block=8).tolist()
        [64, 81, 98, 115]
    """
    if bits == 8:
        return codes
    rows = jnp.moveaxis(codes, axis, 0)
    rows = rows.reshape(-1, block, *rows.shape[1:])
    planes, low = [], 0
    for width in plane_widths(bits):
        n = 8 // width
        fields = (rows >> low) & ((1 << width) - 1)
        fields = fields.reshape(rows.shape[0], n, block // n, *rows.shape[2:])
        packed = fields[:, 0]
        for i in range(1, n):
            packed = packed | (fields[:, i] << (width * i))
        planes.append(packed)
        low += width
    out = jnp.concatenate(planes, axis=1)
    return jnp.moveaxis(out.reshape(-1, *out.shape[2:]), 0, axis)


def split_planes(packed: jax.Array, bits: int, block: int) -> tuple[jax.Array, ...]:
    """Return the planes of ``packed[..., K · bits / 8, N]``, low bits first.

    Returns:
        One array ``[..., K / block, block · width / 8, N]`` (uint8) per plane width;
        for a single plane a mere reshape, for several a copy.
    """
    lead, columns = packed.shape[:-2], packed.shape[-1]
    rows = packed.reshape(*lead, -1, block * bits // 8, columns)
    planes, start = [], 0
    for width in plane_widths(bits):
        stop = start + block * width // 8
        planes.append(rows[..., start:stop, :])
        start = stop
    return tuple(planes)


def join_planes(planes: Sequence[jax.Array], bits: int) -> jax.Array:
    """Return the codes ``[..., blocks, block, N]`` of the planes of `split_planes`.

    A shift that differs from field to field and a mask: arithmetic on whole vectors,
    which XLA fuses into whatever comes next. Concatenating the fields would not fuse.
    """
    parts: list[jax.Array] = []
    low = 0
    for plane, width in zip(planes, plane_widths(bits), strict=True):
        n = 8 // width
        shift = np.arange(n, dtype=np.uint8)[:, None, None] * np.uint8(width)
        fields = (plane[..., None, :, :] >> shift) & np.uint8(2**width - 1)
        shape = (*plane.shape[:-2], n * plane.shape[-2], plane.shape[-1])
        parts.append(fields.reshape(shape) << np.uint8(low))
        low += width
    return functools.reduce(operator.or_, parts)


def unpack(packed: jax.Array, bits: int, axis: int, block: int) -> jax.Array:
    """Invert `pack`: bytes to uint8 codes along ``axis``."""
    if bits == 8:
        return packed
    rows = jnp.moveaxis(packed, axis, 0)
    tail = rows.shape[1:]
    planes = split_planes(rows.reshape(rows.shape[0], math.prod(tail)), bits, block)
    return jnp.moveaxis(join_planes(planes, bits).reshape(-1, *tail), 0, axis)


def unpack_rows(packed: jax.Array, bits: int, block: int, rows: jax.Array) -> jax.Array:
    """Return some rows of codes packed along the first axis: ``unpack(...)[rows]``.

    Only the bytes that hold them are read.

    Args:
        packed: uint8 ``[K · bits / 8, N]``.
        bits: bits per code.
        block: rows per packing block.
        rows: int ``[C]``, each below K.

    Returns:
        uint8 ``[C, N]``.

    Example:
        >>> import jax.numpy as jnp
        >>> packed = pack(jnp.arange(8, dtype=jnp.uint8), bits=4, axis=0, block=8)
        >>> unpack_rows(packed[:, None], 4, 8, jnp.asarray([6, 1]))[:, 0].tolist()
        [6, 1]
    """
    if bits == 8:
        return packed[rows]
    number, inside = rows // block, rows % block
    start, low = number * (block * bits // 8), 0
    parts: list[jax.Array] = []
    for width in plane_widths(bits):
        size = block * width // 8
        field, place = inside // size, inside % size
        shift = (field * width).astype(jnp.uint8)[:, None]
        codes = (packed[start + place] >> shift) & np.uint8(2**width - 1)
        parts.append(codes << np.uint8(low))
        start, low = start + size, low + width
    return functools.reduce(operator.or_, parts)
