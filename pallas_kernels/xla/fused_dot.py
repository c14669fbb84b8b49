"""Products with one row: decode, multiply and add in a single loop over the bytes."""

import functools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import layouts
from pallas_kernels.xla.tiles import Decode, all_groups

TERMS = 16


def sum_block(rows: int, bits: int, pack: int, group: int) -> int:
    """Return the rows that `fused_dot` takes as a block: those of a packing block.

    8-bit codes have none, and take up to 16 rows. The group must be a multiple of it.
    """
    return math.gcd(rows, group, TERMS) if bits == 8 else pack


def fused_dot(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    pack: int,
    group: int,
    decode: Decode,
) -> jax.Array:
    """Return ``x @ ((decode(codes) − zeros) · scales)`` for very few rows.

    With one row a weight is used once, and should not be written as a float anywhere,
    not even to the cache. XLA:CPU fuses nothing into a dot, and does not vectorize its
    fused sums over rows; but 16 rows added up by hand are one elementwise expression ::

        part[s, n] = scale · (Σ_i x[s, i] · decode(codes[s, i, n]) − zero · Σ_i x[s, i])

    that becomes one parallel loop of vector instructions, from packed bytes to K / 16
    sums per column. A product with ones adds those up.

    Args:
        x: ``[M, K]``; K may lack the weight's padding rows. Every row decodes the
            weight anew.
        codes: packed uint8 ``[K · bits / 8, N]``.
        scales: float32 ``[groups, N]``; one group stands for all rows.
        zeros: float32 like ``scales``, or None.
        bits: bits per code.
        pack: rows per packing block.
        group: rows per scale, a multiple of `sum_block`.
        decode: from uint8 codes to float32 numbers.

    Returns:
        float32 ``[M, N]``.
    """
    rows, columns = codes.shape[0] * 8 // bits, codes.shape[1]
    block = sum_block(rows, bits, pack, group)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, rows - x.shape[1])))

    def per_block(values: jax.Array) -> jax.Array:
        """Spread ``[groups, N]`` over blocks: ``[blocks or 1, 1, N]``."""
        if values.shape[0] > 1:
            values = all_groups(values, rows, group)
            values = jnp.repeat(values, group // block, axis=0)[: rows // block]
        return values[:, None]

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, block)
        terms = list(_terms(x, codes.reshape(x.shape[0], -1, columns), bits))
        total = sum(factor * decode(code) for factor, code in terms)
        if zeros is not None:
            total = total - per_block(zeros) * sum(factor for factor, _ in terms)
        parts = (total * per_block(scales)).reshape(-1, columns)
        return jnp.ones((1, parts.shape[0]), jnp.float32) @ parts

    return jnp.concatenate([one(row) for row in x])


def _terms(
    x: jax.Array, codes: jax.Array, bits: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield the factors ``[blocks, sums, 1]`` and codes ``[blocks, sums, N]`` of terms.

    Every plane keeps a *piece* of a block's rows in one of its fields: a half for 4
    bits, a fourth for 2, an eighth for 3 = 2 + 1. A sum takes every ``step``-th row of
    each.

    Args:
        x: ``[blocks, block]``.
        codes: ``[blocks, block · bits / 8, N]``.
        bits: bits per code.
    """
    widths = layouts.plane_widths(bits)
    pieces = 8 // widths[-1]
    size = x.shape[1] // pieces
    step = math.gcd(size, TERMS // pieces)
    for piece in range(pieces):
        for first in range(step):
            start = piece * size + first
            factor = x[:, start : (piece + 1) * size : step, None]
            parts: list[jax.Array] = []
            at, low = 0, 0
            for width in widths:
                field, part = divmod(piece, pieces * width // 8)
                rows = slice(at + part * size + first, at + (part + 1) * size, step)
                bits_of = (codes[:, rows] >> (width * field)) & (2**width - 1)
                parts.append(bits_of << low)
                at, low = at + x.shape[1] * width // 8, low + width
            yield factor, functools.reduce(operator.or_, parts)
