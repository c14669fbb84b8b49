"""How a packed weight is walked: tiles of rows, each small enough for the cache.

Dequantizing a whole weight before a matrix product makes XLA:CPU write a float copy of
it: 64 MiB for 4096 x 4096, and the product then runs at the speed of memory. Walking
over tiles of a few hundred rows keeps the floats in the cache.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import layouts

Decode = Callable[[jax.Array], jax.Array]

ROWS_PER_TILE = 512
ELEMENTS_PER_TILE = 1 << 21


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static geometry of a walk over ``rows`` packed rows.

    Attributes:
        rows: rows of the weight, padding included.
        bits: bits per code.
        pack: rows per packing block (for 8 bits, which need none: rows per scale).
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
        codes: jax.Array,
        scales: jax.Array,
        bits: int,
        pack: int,
        group: int,
        times: int = 1,
    ) -> "Tiling":
        """Choose the largest tile in the cache that cuts no block and no group.

        Args:
            codes: ``[..., rows · bits / 8, N]``.
            scales: ``[..., groups, N]``; one group stands for all rows.
            bits: bits per code.
            pack: rows per packing block.
            group: rows per scale.
            times: how many times larger than others the tile may be.
        """
        rows, columns = codes.shape[-2] * 8 // bits, codes.shape[-1]
        group = rows if scales.shape[-2] == 1 else group
        most = min(ROWS_PER_TILE, ELEMENTS_PER_TILE // max(columns, 1))
        most = max(most * times, 1)
        unit = pack if bits < 8 else 1
        if group % unit:
            unit = math.lcm(unit, group)
        fits = [
            d
            for d in _divisors(rows)
            if d % unit == 0 and (d % group == 0 or group % d == 0)
        ]
        tile = max((d for d in fits if d <= most), default=fits[0])
        return cls(rows, bits, pack if bits < 8 else min(group, tile), group, tile)

    @property
    def steps(self) -> int:
        """The number of tiles."""
        return self.rows // self.tile

    def split_activation(self, x: jax.Array) -> jax.Array:
        """Arrange ``x[M, rows]`` as ``[steps, M, tile]``; missing rows are zeros."""
        x = jnp.pad(x, ((0, 0), (0, self.rows - x.shape[1])))
        return x.reshape(x.shape[0], self.steps, self.tile).swapaxes(0, 1)

    def planes(self, codes: jax.Array) -> tuple[jax.Array, ...]:
        """Return the planes of all codes, for `weight`.

        Cut before the walk: two views of one slice inside it keep XLA:CPU from using
        vector instructions (20 times slower).
        """
        return layouts.split_planes(codes, self.bits, self.pack)

    def weight(
        self,
        planes: Sequence[jax.Array],
        scales: jax.Array | None,
        zeros: jax.Array | None,
        step: jax.Array,
        decode: Decode,
    ) -> jax.Array:
        """Return tile ``step`` of the weight ``[..., tile, N]``, decoded and scaled."""
        blocks = self.tile // self.pack
        here = [_slice(plane, step * blocks, blocks, -3) for plane in planes]
        w = decode(layouts.join_planes(here, self.bits))
        w = w if zeros is None else w - self._spread(zeros, step)
        w = w if scales is None else w * self._spread(scales, step)
        return w.reshape(*w.shape[:-3], self.tile, w.shape[-1])

    def groups(self, values: jax.Array, step: jax.Array) -> jax.Array:
        """Return tile ``step``'s part of ``values[..., groups, N]``."""
        values = all_groups(values, self.rows, self.group)
        count = max(self.tile // self.group, 1)
        return _slice(values, step * self.tile // self.group, count, -2)

    def _spread(self, values: jax.Array, step: jax.Array) -> jax.Array:
        """Return tile ``step``'s group values, to broadcast with ``[blocks, pack]``."""
        part = self.groups(values, step)
        blocks = self.tile // self.pack
        if part.shape[-2] in (1, blocks):
            return part[..., None, :]
        if self.group % self.pack:
            row = np.arange(self.tile).reshape(blocks, self.pack)
            return part[..., row // self.group, :]
        return jnp.repeat(part, self.group // self.pack, axis=-2)[..., None, :]


def all_groups(values: jax.Array, rows: int, group: int) -> jax.Array:
    """Return ``values[..., groups, N]``, zero for groups that only padding adds."""
    missing = max(-(-rows // group) - values.shape[-2], 0)
    return jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, missing), (0, 0)])


def _slice(values: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """Return ``size`` entries along ``axis`` (negative)."""
    return lax.dynamic_slice_in_dim(values, start, size, axis=values.ndim + axis)


def _divisors(n: int) -> list[int]:
    """Return the divisors of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
