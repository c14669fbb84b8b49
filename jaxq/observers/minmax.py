"""The range of an activation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import Observer


class Range(NamedTuple):
    """The extremes of an activation, and how many tokens were seen.

    Attributes:
        low: smallest value, float32.
        high: largest value, float32.
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
    """Return the observer of ``(min x, max x)`` over all elements and batches."""

    def init(like: jax.ShapeDtypeStruct) -> Range:
        infinite = jnp.asarray(jnp.inf, jnp.float32)
        return Range(infinite, -infinite, jnp.asarray(0, jnp.int32))

    def update(state: Range, x: jax.Array) -> Range:
        values = x.astype(jnp.float32)
        rows = x.size // max(x.shape[-1], 1) if x.ndim else 1
        seen = Range(jnp.min(values), jnp.max(values), jnp.asarray(rows, jnp.int32))
        return merge(state, seen)

    def merge(a: Range, b: Range) -> Range:
        low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        return Range(low, high, a.tokens + b.tokens)

    return Observer(init, update, merge)
