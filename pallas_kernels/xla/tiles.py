"""How a packed weight is walked: tiles of rows, and the row ranges inside a tile.

Dequantizing a whole weight before a matrix product makes XLA:CPU write a float copy of
it: 64 MiB for 4096 x 4096, and the product then runs at the speed of memory. Walking
over tiles of a few hundred rows keeps the floats in the cache.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import layouts

ROWS_PER_TILE = 512
ELEMENTS_PER_TILE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static geometry of a walk over ``rows`` packed rows.

    Attributes:
        rows: rows of the weight, padding included.
        bits: bits per code.
        pack: rows per packing block.
        group: rows per scale (``rows`` when one scale serves all).
        tile: rows per step.
    """

    rows: int
    bits: int
    pack: int
    group: int
    tile: int

    @classmethod
    def of(
        cls,
        rows: int,
        columns: int,
        bits: int,
        pack: int,
        group: int,
        limit: int | None = None,
    ) -> "Tiling":
        """Choose the largest tile within the limits that cuts no block and no group.

        Args:
            rows: rows of the weight, padding included; a multiple of ``pack``.
            columns: columns of the weight.
            bits: bits per code.
            pack: rows per packing block.
            group: rows per scale; at least ``rows`` when one scale serves all.
            limit: the most rows per step; by default what stays in the cache.
        """
        group = min(group, rows)
        most = max(min(ROWS_PER_TILE, ELEMENTS_PER_TILE // max(columns, 1)), 1)
        most = most if limit is None else limit
        unit = pack if bits < 8 else 1
        if group % unit:
            unit = math.lcm(unit, group)
        fits = [
            d
            for d in _divisors(rows)
            if d % unit == 0 and (d % group == 0 or group % d == 0)
        ]
        tile = max((d for d in fits if d <= most), default=fits[0])
        if bits == 8:
            pack = min(group, tile)
        return cls(rows, bits, pack, group, tile)

    @property
    def steps(self) -> int:
        """The number of tiles."""
        return self.rows // self.tile

    @property
    def pieces(self) -> int:
        """The contiguous row ranges that a packing block unpacks to."""
        return layouts.pieces_per_block(self.bits)

    @property
    def piece_rows(self) -> int:
        """The rows of one piece of one packing block."""
        return self.pack // self.pieces

    def split_activation(self, x: jax.Array) -> jax.Array:
        """Arrange ``x[M, rows]`` as ``[steps, pieces, M, tile / pieces]``."""
        blocks = self.tile // self.pack
        shape = (x.shape[0], self.steps, blocks, self.pieces, self.piece_rows)
        parts = x.reshape(shape).transpose(1, 3, 0, 2, 4)
        return parts.reshape(self.steps, self.pieces, x.shape[0], -1)

    def codes_of(self, codes: jax.Array, step: jax.Array) -> list[jax.Array]:
        """Return the pieces ``[..., blocks, piece_rows, N]`` (uint8) of tile ``step``."""
        size = self.tile * self.bits // 8
        tile = jax.lax.dynamic_slice_in_dim(
            codes, step * size, size, axis=codes.ndim - 2
        )
        blocks = self.tile // self.pack
        shape = (*codes.shape[:-2], blocks, size // blocks, codes.shape[-1])
        return layouts.unpack_pieces(tile.reshape(shape), self.bits)

    def groups_of(self, values: jax.Array, step: jax.Array) -> list[jax.Array]:
        """Return per-group values spread so that they broadcast with `codes_of`.

        Args:
            values: ``[..., groups, N]``.
            step: the tile.
        """
        count = max(self.tile // self.group, 1)
        first = step * self.tile // self.group
        part = jax.lax.dynamic_slice_in_dim(values, first, count, axis=values.ndim - 2)
        return [self._spread(part, piece) for piece in range(self.pieces)]

    def _spread(self, part: jax.Array, piece: int) -> jax.Array:
        """Spread one tile's group values ``[..., count, N]`` over one piece's rows."""
        if part.shape[-2] == 1:
            return part[..., None, :]
        blocks = self.tile // self.pack
        if self.group % self.pack:
            row = np.arange(piece * self.piece_rows, (piece + 1) * self.piece_rows)
            index = (np.arange(blocks)[:, None] * self.pack + row) // self.group
            return part[..., index, :]
        each = self.group // self.pack
        out = jnp.broadcast_to(
            part[..., :, None, :], (*part.shape[:-1], each, part.shape[-1])
        )
        return out.reshape(*part.shape[:-2], blocks, 1, part.shape[-1])


def _divisors(n: int) -> list[int]:
    """Return the divisors of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
