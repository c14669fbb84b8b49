"""Formats given by a table of numbers: nf4, fp4, the dynamic 8-bit maps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxq.formats.base import Format
from pallas_kernels.kernel import Coding

# QLoRA (Dettmers et al. 2023), appendix E; bit-exact as in bitsandbytes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

# OCP Microscaling v1.0: sign bit, 2 exponent bits, 1 mantissa bit.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = _E2M1_MAGNITUDES + tuple(-m for m in _E2M1_MAGNITUDES)

# bitsandbytes' own fp4, in the order of its codes.
_BNB_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_BNB_MAGNITUDES = tuple(float(np.float32(m / 12.0)) for m in _BNB_TWELFTHS)
FP4_BNB = _BNB_MAGNITUDES + tuple(-m for m in _BNB_MAGNITUDES)


def dynamic_map(signed: bool) -> tuple[float, ...]:
    """Return the 256 numbers of the dynamic-tree map (Dettmers 2016, 2022).

    For ``i = 0..6`` there are ``2^i`` (unsigned: ``2^(i+1)``) numbers, the midpoints of
    equal cells of [0.1, 1], times ``10^(i-6)``; with their negatives when signed; and
    0 and 1. Small numbers get an exponent, large ones a fraction.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _float32_linspace(2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        cells = (np.float32(10.0 ** (i - 6)) * middles).tolist()
        values += cells + [-c for c in cells] * signed
    return tuple(sorted(values))


def _float32_linspace(n: int) -> np.ndarray:
    """Return ``linspace(0.1, 1, n)`` as torch computes it in float32, from both ends.

    bitsandbytes builds its tables with it; only so are ours equal bit by bit.
    """
    start, stop, i = np.float32(0.1), np.float32(1), np.arange(n)
    step = np.float64((stop - start) / np.float32(n - 1))
    low = (np.float64(start) + step * i).astype(np.float32)
    high = (np.float64(stop) - step * (n - 1 - i)).astype(np.float32)
    return np.where(i < n // 2, low, high)


@dataclasses.dataclass(frozen=True)
class CodebookFormat(Format):
    """A table of numbers in the order of their codes.

    Attributes:
        table: ``2**bits`` numbers; equal numbers (+0, -0) may occur twice, then the
            first is used to encode.
        ties_to_even: whether a number half-way between two levels goes to the one with
            the even code (floating point) or to the lower one (bitsandbytes).
    """

    table: tuple[float, ...] = ()
    ties_to_even: bool = False

    @property
    def lowest(self) -> float:
        """The smallest number of the table."""
        return min(self.table)

    @property
    def highest(self) -> float:
        """The largest number of the table."""
        return max(self.table)

    @functools.cached_property
    def _levels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct numbers ascending, their codes, and the thresholds between."""
        codes = np.argsort(np.asarray(self.table, np.float64), kind="stable")
        values = np.asarray(self.table, np.float64)[codes]
        keep = np.concatenate([[True], np.diff(values) > 0])
        codes, values = codes[keep], values[keep]
        middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
        if self.ties_to_even:
            # "x > t" sends a tie down; where the upper code is even it must go up
            up = (codes[1:] & 1) == 0
            middle = np.where(up, np.nextafter(middle, np.float32(-np.inf)), middle)
        return values, codes.astype(np.uint8), middle

    def coding(self, pack: int) -> Coding:
        """Return what a kernel must know of codes packed in blocks of ``pack`` rows."""
        return Coding("table", self.bits, pack, table=self.table)

    def encode(self, x: jax.Array) -> jax.Array:
        """Return the code of the nearest number of the table."""
        _, codes, middle = self._levels
        x = x.astype(jnp.float32)
        if len(middle) >= 32:
            return jnp.asarray(codes)[jnp.searchsorted(jnp.asarray(middle), x)]
        # every threshold passed adds the step to the next code, modulo 256: unlike a
        # look-up of the codes, that vectorizes
        code = jnp.full(x.shape, codes[0])
        for threshold, step in zip(middle.tolist(), np.diff(codes), strict=True):
            code = code + jnp.where(x > threshold, step, np.uint8(0))
        return code

    def decode(self, codes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the numbers of the codes."""
        if self.bits > 4:
            table = jnp.asarray(self.table, jnp.float32).astype(dtype)
            return table[codes.astype(jnp.int32)]
        return _select(codes, self.table).astype(dtype)


def _select(codes: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """Look codes up by a tree of selects: XLA vectorizes it, unlike a gather.

    The lowest bit chooses between two constants by arithmetic on their bit patterns.
    A select would need them as arrays, which JAX moves out of a loop that is
    differentiated: sixteen arrays of the size of a tile.
    """
    words = np.asarray(table, np.float32).view(np.int32).tolist()
    lowest = -(codes.astype(jnp.int32) & 1)
    pairs = zip(words[::2], words[1::2], strict=True)
    patterns = [(lowest & (odd ^ even)) ^ even for even, odd in pairs]
    values = [lax.bitcast_convert_type(p, jnp.float32) for p in patterns]
    bit = 2
    while len(values) > 1:
        taken = (codes & bit) != 0
        choices = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(taken, odd, even) for even, odd in choices]
        bit *= 2
    return values[0]
