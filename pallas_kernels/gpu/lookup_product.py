"""Products with binary-coded weights by looking sums up: LUT-GEMM.

A weight is a sum of q signs, ``w[k, n] = Σ_i α_i[g, n] · b_i[k, n]``, ``b = ±1``. The
product with eight rows of signs is one of 256 sums of eight activations, so a table of
those per byte of K turns q · K multiplications per output into q · K / 8 look-ups ::

    T[m, j, byte] = Σ_r x[m, 8 j + r] · (2 · bit_r(byte) − 1)
    y[m, n] = Σ_i Σ_g α_i[g, n] Σ_{j in g} T[m, j, bits_i[j, n]]

XLA makes the tables (a small matrix product); the kernel looks up, through the cache.
Worth it for a few rows only: each needs tables of its own.

Source: Park et al. 2022, LUT-GEMM (arXiv 2206.09557).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BITS = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the product is cut.

    Attributes:
        columns: per thread block, 2^n.
        splits: parts of K that different thread blocks sum.
        warps: per thread block.
    """

    columns: int = 256
    splits: int = 8
    warps: int = 4


TILES = (Tile(), Tile(512, 8), Tile(256, 16), Tile(128, 16, 2))


@dataclasses.dataclass(frozen=True)
class Case:
    """A product: rows, K, N, signs per weight, rows per scale."""

    name: str
    rows: int
    inner: int
    columns: int
    signs: int
    group: int

    def arrays(self, seed: int = 0) -> list[jax.Array]:
        """Return random arguments of `lookup_product`."""
        random = np.random.default_rng(seed)
        size = self.signs, self.inner // BITS, self.columns
        scales = random.uniform(0.1, 1, (self.signs, self.inner // self.group, size[2]))
        x = random.standard_normal((self.rows, self.inner)).astype(np.float32)
        bits = random.integers(0, 256, size, dtype=np.uint8)
        return [jnp.asarray(x), jnp.asarray(bits), jnp.asarray(scales, jnp.float32)]


CASES = (
    Case("2 signs, g128", 1, 256, 128, 2, 128),
    Case("3 signs, odd columns", 2, 128, 100, 3, 64),
)


def lookup_product(
    x: jax.Array,
    bits: jax.Array,
    scales: jax.Array,
    *,
    tile: Tile = TILES[0],
    interpret: bool = False,
) -> jax.Array:
    """Return ``y = Σ_i x @ (α_i · (2 · bits_i − 1))``.

    Args:
        x: float ``[M, K]``.
        bits: uint8 ``[q, K / 8, N]``; bit r of byte j is row ``8 j + r``.
        scales: float32 ``[q, groups, N]``, groups of equally many bytes.
        tile: how to cut.
        interpret: whether to run on a CPU.

    Returns:
        float32 ``[M, N]``.

    Raises:
        ValueError: when groups do not divide the bytes of K.
    """
    signs, length, columns = bits.shape
    groups = scales.shape[1]
    if length % groups:
        raise ValueError(
            f"{groups} groups do not divide {length} bytes of K = {8 * length}"
        )
    wide = min(tile.columns, 1 << (columns - 1).bit_length())
    pad = ((0, 0), (0, 0), (0, -columns % wide))
    bits, scales = jnp.pad(bits, pad), jnp.pad(scales.astype(jnp.float32), pad)
    splits = int(np.gcd(groups, tile.splits))
    y = pl.pallas_call(
        functools.partial(_kernel, groups // splits, length // groups),
        grid=(bits.shape[2] // wide, x.shape[0], splits),
        in_specs=[
            pl.BlockSpec((None, length * 256), lambda j, m, s: (m, 0)),
            pl.BlockSpec((signs, length, wide), lambda j, m, s: (0, 0, j)),
            pl.BlockSpec((signs, groups, wide), lambda j, m, s: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, None, wide), lambda j, m, s: (s, m, j)),
        out_shape=jax.ShapeDtypeStruct(
            (splits, x.shape[0], bits.shape[2]), jnp.float32
        ),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=interpret,
    )(tables(x).reshape(x.shape[0], -1), bits, scales)
    return jnp.sum(y, axis=0)[:, :columns]


def tables(x: jax.Array) -> jax.Array:
    """Return the signed sums of every eight channels: float32 ``[M, K / 8, 256]``."""
    rows = np.arange(256)[None] >> np.arange(BITS)[:, None]
    signs = jnp.asarray(2.0 * (rows & 1) - 1, jnp.float32)
    eights = x.astype(jnp.float32).reshape(x.shape[0], -1, BITS)
    return jnp.matmul(eights, signs, precision="highest")


def _kernel(
    groups: int, length: int, table: Any, bits: Any, scales: Any, out: Any
) -> None:
    """Look the sums of one row up for a tile of columns and a part of K."""
    first = pl.program_id(2) * groups

    def group(g: Any, total: jax.Array) -> jax.Array:
        for i in range(bits.shape[0]):

            def add(j: Any, part: jax.Array, i: int = i) -> jax.Array:
                byte = (first + g) * length + j
                return part + table[byte * 256 + bits[i, byte].astype(jnp.int32)]

            part = lax.fori_loop(0, length, add, jnp.zeros(out.shape, jnp.float32))
            total = total + part * scales[i, first + g]
        return total

    out[...] = lax.fori_loop(0, groups, group, jnp.zeros(out.shape, jnp.float32))


def reference(x: jax.Array, bits: jax.Array, scales: jax.Array) -> jax.Array:
    """Return the same as a float32 matrix product."""
    rows = bits[:, :, None] >> np.arange(BITS, dtype=np.uint8)[:, None]
    signs = 2.0 * (rows & np.uint8(1)).astype(jnp.float32) - 1.0
    signs = signs.reshape(bits.shape[0], -1, bits.shape[2])
    group = signs.shape[1] // scales.shape[1]
    weight = jnp.sum(signs * jnp.repeat(scales, group, axis=1), axis=0)
    return jnp.matmul(x.astype(jnp.float32), weight, precision="highest")
