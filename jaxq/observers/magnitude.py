"""The mean magnitude of every channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import Observer, summary
from jaxq.observers.rows import Rows, width


class Magnitude(NamedTuple):
    """The summed magnitude of every channel, and how many tokens were seen.

    Attributes:
        total: ``Σ |x|`` over tokens, ``float32[K]``.
        tokens: rows seen, int32.
    """

    total: jax.Array
    tokens: jax.Array

    @property
    def mean(self) -> jax.Array:
        """``Σ |x| / tokens``, ``float32[K]``; 0 of nothing."""
        tokens = jnp.maximum(self.tokens, 1).astype(jnp.float32)
        return self.total / tokens[..., None]


def magnitude() -> Observer:
    """Return the observer of ``Σ |x|`` per channel (AWQ, Lin et al. 2023).

    Example:
        >>> observer = magnitude()
        >>> state = observer.init(jax.ShapeDtypeStruct((2, 2), jnp.float32))
        >>> state = observer.update(state, jnp.asarray([[1.0, -3.0], [2.0, 5.0]]))
        >>> state.total.tolist(), state.mean.tolist()
        ([3.0, 8.0], [1.5, 4.0])
    """

    def init(like: jax.ShapeDtypeStruct) -> Magnitude:
        total = jnp.zeros((width(like),), jnp.float32)
        return Magnitude(total, jnp.zeros((), jnp.int32))

    def see(rows: Rows) -> Magnitude:
        tokens = tuple(range(rows.values.ndim - 1))
        return Magnitude(jnp.sum(jnp.abs(rows.values), axis=tokens), rows.tokens)

    def merge(a: Magnitude, b: Magnitude) -> Magnitude:
        return Magnitude(a.total + b.total, a.tokens + b.tokens)

    return summary(init, see, merge)
