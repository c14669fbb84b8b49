"""The range of an activation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import Bounds, Observer, honest, summary
from jaxq.observers.rows import Rows
from jaxq.spec import QuantSpec


class Range(NamedTuple):
    """The extremes of an activation, and how many tokens were seen.

    Attributes:
        low: smallest value, float32; +inf of nothing, NaN where NaN was seen.
        high: largest value, float32; −inf of nothing.
        tokens: rows seen (all axes but the last), int32.
    """

    low: jax.Array
    high: jax.Array
    tokens: jax.Array

    @property
    def absmax(self) -> jax.Array:
        """The largest magnitude."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


def minmax() -> Observer:
    """Return the observer of ``(min x, max x)`` over all elements and batches.

    Its range is that: nothing is clipped.

    Example:
        >>> observer = minmax()
        >>> state = observer.init(jax.ShapeDtypeStruct((1, 3), jnp.float32))
        >>> state = observer.update(state, jnp.asarray([[1.0, -3.0, 2.0]]))
        >>> float(state.low), float(state.high)
        (-3.0, 2.0)
    """

    def init(like: jax.ShapeDtypeStruct) -> Range:
        infinite = jnp.asarray(jnp.inf, jnp.float32)
        return Range(infinite, -infinite, jnp.zeros((), jnp.int32))

    def merge(a: Range, b: Range) -> Range:
        low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        return Range(low, high, a.tokens + b.tokens)

    def bounds(state: Range, spec: QuantSpec) -> Bounds:
        return honest(state, state.low, state.high)

    return summary(init, see_range, merge, bounds)


def see_range(rows: Rows) -> Range:
    """Return the extremes of one batch."""
    infinite = jnp.float32(jnp.inf)
    low = jnp.min(rows.values, initial=infinite, where=rows.keep)
    high = jnp.max(rows.values, initial=-infinite, where=rows.keep)
    return Range(low, high, rows.tokens)
