"""A moving average of the ranges of the batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import Bounds, Observer, honest
from jaxq.observers.minmax import see_range
from jaxq.observers.rows import observe
from jaxq.spec import QuantSpec


class AverageRange(NamedTuple):
    """The averaged extremes of an activation, and how many tokens were seen.

    Attributes:
        low: averaged smallest value, float32; 0 of nothing.
        high: averaged largest value, float32; 0 of nothing.
        tokens: rows seen, int32.
    """

    low: jax.Array
    high: jax.Array
    tokens: jax.Array


def moving_average(momentum: float = 0.9) -> Observer:
    """Return the observer of the exponential moving average of ``(min x, max x)``.

    ``low ← m·low + (1 − m)·min x`` per batch, and so ``high``; the first batch is taken
    as it is, one without tokens changes nothing. Two averages over time have no order
    in which they could be joined: ``merge`` is their mean, weighted by tokens. So
    ``update`` depends on the order of batches, ``merge`` does not, and merging states
    of one batch each is averaged MinMax.

    Args:
        momentum: the share ``m`` of the past that is kept, in [0, 1).

    Raises:
        ValueError: when ``momentum`` is out of range.

    Example:
        >>> observer = moving_average(momentum=0.75)
        >>> state = observer.init(jax.ShapeDtypeStruct((1, 2), jnp.float32))
        >>> for largest in (4.0, 8.0):
        ...     state = observer.update(state, jnp.asarray([[-1.0, largest]]))
        >>> float(state.low), float(state.high)
        (-1.0, 5.0)
    """
    if not 0 <= momentum < 1:
        raise ValueError(
            f"momentum={momentum} must lie in [0, 1): 0 keeps the last batch, 0.9 is "
            f"usual"
        )

    def init(like: jax.ShapeDtypeStruct) -> AverageRange:
        nothing = jnp.zeros((), jnp.float32)
        return AverageRange(nothing, nothing, jnp.zeros((), jnp.int32))

    def update(
        state: AverageRange, x: jax.Array, mask: jax.Array | None = None
    ) -> AverageRange:
        seen = observe(see_range, x, mask)
        kept = jnp.where(state.tokens == 0, jnp.float32(0), jnp.float32(momentum))
        kept = jnp.where(seen.tokens == 0, jnp.float32(1), kept)
        low = _mean(state.low, kept, seen.low, 1 - kept)
        high = _mean(state.high, kept, seen.high, 1 - kept)
        return AverageRange(low, high, state.tokens + seen.tokens)

    def merge(a: AverageRange, b: AverageRange) -> AverageRange:
        tokens = a.tokens + b.tokens
        total = jnp.maximum(tokens, 1).astype(jnp.float32)
        share_a = a.tokens.astype(jnp.float32) / total
        share_b = b.tokens.astype(jnp.float32) / total
        low = _mean(a.low, share_a, b.low, share_b)
        return AverageRange(low, _mean(a.high, share_a, b.high, share_b), tokens)

    def bounds(state: AverageRange, spec: QuantSpec) -> Bounds:
        return honest(state, state.low, state.high)

    return Observer(init, update, merge, bounds)


def _mean(
    a: jax.Array, share_a: jax.Array, b: jax.Array, share_b: jax.Array
) -> jax.Array:
    """Return ``share_a · a + share_b · b``; what has no share may be infinite."""
    nothing = jnp.float32(0)
    a = jnp.where(share_a == 0, nothing, a * share_a)
    return a + jnp.where(share_b == 0, nothing, b * share_b)
