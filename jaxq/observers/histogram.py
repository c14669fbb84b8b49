"""A histogram whose range grows with the data, and which still merges exactly."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.observers.base import Bounds, Observer, summary
from jaxq.observers.minmax import see_range
from jaxq.observers.rows import Rows
from jaxq.spec import QuantSpec

SMALLEST_BINS, LARGEST_BINS = 64, 8192
# 2^-100 is the range of nothing, and of anything smaller.
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -100, 128


class Histogram(NamedTuple):
    """How often values occur, in equal bins on ``[−2^e, 2^e)``.

    The range is the smallest power of two that holds the data, and the number of bins
    is one too: bin edges are exact, and a wider range joins bins in pairs. So the
    histogram of two batches is the same whether they are seen at once, one after the
    other, or merged, in any order (up to the rounding of counts above 2^24).

    Attributes:
        counts: ``float32[bins]``; exact zeros are not among them.
        zeros: how many elements are exactly zero, float32.
        exponent: ``e``, int32.
        low: smallest value, float32; +inf of nothing, NaN where NaN was seen.
        high: largest value, float32; −inf of nothing.
        tokens: rows seen, int32.
    """

    counts: jax.Array
    zeros: jax.Array
    exponent: jax.Array
    low: jax.Array
    high: jax.Array
    tokens: jax.Array

    @property
    def bin_width(self) -> jax.Array:
        """``2^e / (bins / 2)``."""
        half = self.counts.shape[-1] // 2
        return _power_of_two(self.exponent - (half.bit_length() - 1))


def histogram(bins: int, bounds: Callable[[Histogram, QuantSpec], Bounds]) -> Observer:
    """Return the observer of the distribution of all elements.

    Args:
        bins: a power of two; half of them are on each side of zero.
        bounds: how a range is found in it, as in `Observer`.

    Raises:
        ValueError: when ``bins`` is not a power of two, or too few or too many.
    """
    if bins & (bins - 1) or not SMALLEST_BINS <= bins <= LARGEST_BINS:
        raise ValueError(
            f"bins={bins} must be a power of two from {SMALLEST_BINS} to "
            f"{LARGEST_BINS}, so that histograms of different ranges merge exactly: "
            f"4096 is usual"
        )

    return _counting(bins)._replace(bounds=bounds)


@functools.cache
def _counting(bins: int) -> Observer:
    """Return the observer without a range, the same functions every time.

    So what was compiled for one way to find a range serves all of them.
    """

    def init(like: jax.ShapeDtypeStruct) -> Histogram:
        infinite = jnp.asarray(jnp.inf, jnp.float32)
        return Histogram(
            counts=jnp.zeros((bins,), jnp.float32),
            zeros=jnp.zeros((), jnp.float32),
            exponent=jnp.asarray(_SMALLEST_EXPONENT, jnp.int32),
            low=infinite,
            high=-infinite,
            tokens=jnp.zeros((), jnp.int32),
        )

    return summary(init, functools.partial(_see, bins), _merge)


def _see(bins: int, rows: Rows) -> Histogram:
    """Return the histogram of one batch."""
    counted = rows.keep & (rows.values != 0) & jnp.isfinite(rows.values)
    values = jnp.where(counted, rows.values, jnp.float32(0))
    exponent = _exponent(jnp.max(jnp.abs(values), initial=jnp.float32(0)))
    per_unit = _power_of_two((bins // 2).bit_length() - 1 - exponent)
    index = jnp.floor(values * per_unit).astype(jnp.int32) + bins // 2
    index = jnp.where(counted, jnp.clip(index, 0, bins - 1), bins)
    # Counted as integers: a float32 would stop at 2^24.
    counts = jnp.zeros((bins,), jnp.int32).at[index].add(1, mode="drop")
    zeros = jnp.sum(rows.keep & (rows.values == 0), dtype=jnp.int32)
    return Histogram(
        counts.astype(jnp.float32),
        zeros.astype(jnp.float32),
        exponent,
        *see_range(rows),
    )


def _merge(a: Histogram, b: Histogram) -> Histogram:
    """Return the histogram of both batches, on the wider range."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    return Histogram(
        _widened(a, exponent) + _widened(b, exponent),
        a.zeros + b.zeros,
        exponent,
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        a.tokens + b.tokens,
    )


def _widened(state: Histogram, exponent: jax.Array) -> jax.Array:
    """Return the counts on a range of at least the state's own."""
    bins = state.counts.shape[0]
    doublings = jnp.minimum(exponent - state.exponent, 31)
    # An arithmetic shift rounds down, as the bins of negative numbers need.
    index = ((jnp.arange(bins) - bins // 2) >> doublings) + bins // 2
    return jnp.zeros_like(state.counts).at[index].add(state.counts)


def _exponent(largest: jax.Array) -> jax.Array:
    """Return the smallest ``e`` with ``largest < 2^e``."""
    _, exponent = jnp.frexp(largest)
    exponent = jnp.where(largest > 0, exponent, _SMALLEST_EXPONENT)
    return jnp.clip(exponent, _SMALLEST_EXPONENT, _LARGEST_EXPONENT).astype(jnp.int32)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Return ``2^exponent`` exactly, for a normal float32."""
    bits = (exponent.astype(jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)
