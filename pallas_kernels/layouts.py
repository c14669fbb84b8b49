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

import math

import jax
import jax.numpy as jnp

MAX_PACK = 128


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes of a code, low bits first: ``3 -> (2, 1)``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie in 1..8, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pieces_per_block(bits: int) -> int:
    """Return how many contiguous row ranges a block unpacks to: ``4 bits -> 2``."""
    return 8 // plane_widths(bits)[-1]


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


def unpack_pieces(packed: jax.Array, bits: int) -> list[jax.Array]:
    """Unpack blocks ``[..., block * bits / 8, N]`` into their contiguous row ranges.

    Returns:
        ``pieces_per_block(bits)`` arrays ``[..., block / pieces, N]`` (uint8); piece
        ``i`` holds rows ``i * block / pieces`` onwards of its block.
    """
    if bits == 8:
        return [packed]
    n_pieces = pieces_per_block(bits)
    block = packed.shape[-2] * 8 // bits
    size = block // n_pieces
    pieces: list[jax.Array | None] = [None] * n_pieces
    start, low = 0, 0
    for width in plane_widths(bits):
        n, rows = 8 // width, block * width // 8
        plane = packed[..., start : start + rows, :]
        for i in range(n_pieces):
            field, offset = divmod(i, n_pieces // n)
            part = plane[..., offset * size : (offset + 1) * size, :]
            bits_of = (part >> (width * field)) & ((1 << width) - 1)
            known = pieces[i]
            pieces[i] = bits_of if known is None else known | (bits_of << low)
        start, low = start + rows, low + width
    return [piece for piece in pieces if piece is not None]


def unpack(packed: jax.Array, bits: int, axis: int, block: int) -> jax.Array:
    """Invert `pack`: bytes to uint8 codes along ``axis``."""
    if bits == 8:
        return packed
    rows = jnp.moveaxis(packed, axis, 0)
    tail = rows.shape[1:]
    rows = rows.reshape(-1, block * bits // 8, math.prod(tail))
    out = jnp.concatenate(unpack_pieces(rows, bits), axis=1)
    return jnp.moveaxis(out.reshape(-1, *tail), 0, axis)
