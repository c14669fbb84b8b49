"""A range that leaves out a given share of the values at either end."""

import jax
import jax.numpy as jnp

from jaxq.observers.base import Bounds, Observer, honest
from jaxq.observers.histogram import Histogram, histogram
from jaxq.spec import QuantSpec


def percentile(percent: float = 99.99, bins: int = 4096) -> Observer:
    """Return the observer of the quantiles ``1 − percent`` and ``percent``.

    They are read off a histogram, linearly within a bin: exact to the width of a bin,
    which is at most ``4 / bins`` of the largest magnitude.

    Args:
        percent: between 50 and 100; 100 clips nothing.
        bins: of the histogram, a power of two.

    Raises:
        ValueError: when ``percent`` or ``bins`` is out of range.

    Example:
        >>> observer = percentile(percent=90)
        >>> x = jnp.linspace(-1.0, 1.0, 1000).reshape(100, 10)
        >>> state = observer.update(observer.init(x), x)
        >>> low, high = observer.bounds(state, QuantSpec("int8", "tensor"))
        >>> print(f"{float(low):.2f} {float(high):.2f}")
        -0.80 0.80
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percent={percent} must lie in (50, 100]; 99.99 is usual")
    share = 1 - percent / 100

    def bounds(state: Histogram, spec: QuantSpec) -> Bounds:
        half = state.counts.shape[0] // 2
        left = _position(state.counts, state.zeros, share) - half
        right = half - _position(state.counts[::-1], state.zeros, share)
        low = jnp.maximum(state.low, left * state.bin_width)
        return honest(state, low, jnp.minimum(state.high, right * state.bin_width))

    return histogram(bins, bounds)


def _position(counts: jax.Array, zeros: jax.Array, share: float) -> jax.Array:
    """Return how many bins from the left a share of the elements lies behind.

    Both ends are counted from outside, where sums are small and float32 exact enough.
    """
    half = counts.shape[0] // 2
    # Exact zeros are a bin of their own, without width.
    mass = jnp.concatenate([counts[:half], zeros[None], counts[half:]])
    index = jnp.arange(mass.shape[0])
    start = jnp.where(index > half, index - 1, index).astype(jnp.float32)
    behind = jnp.cumsum(mass)
    target = jnp.float32(share) * behind[-1]
    first = jnp.argmax(behind > target)
    inside = (target - behind[first] + mass[first]) / mass[first]
    return start[first] + jnp.where(first == half, jnp.float32(0), inside)
