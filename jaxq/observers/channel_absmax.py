"""The largest magnitude of every channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import Observer, summary
from jaxq.observers.rows import Rows, width


class ChannelAbsMax(NamedTuple):
    """The largest magnitude of every channel, and how many tokens were seen.

    Attributes:
        largest: ``max |x|`` over tokens, ``float32[K]``; 0 of nothing.
        tokens: rows seen, int32.
    """

    largest: jax.Array
    tokens: jax.Array


def channel_absmax() -> Observer:
    """Return the observer of ``max |x|`` per channel (SmoothQuant, LLM.int8()).

    Example:
        >>> observer = channel_absmax()
        >>> state = observer.init(jax.ShapeDtypeStruct((2, 2), jnp.float32))
        >>> state = observer.update(state, jnp.asarray([[1.0, -9.0], [-2.0, 5.0]]))
        >>> state.largest.tolist()
        [2.0, 9.0]
    """

    def init(like: jax.ShapeDtypeStruct) -> ChannelAbsMax:
        largest = jnp.zeros((width(like),), jnp.float32)
        return ChannelAbsMax(largest, jnp.zeros((), jnp.int32))

    def see(rows: Rows) -> ChannelAbsMax:
        tokens = tuple(range(rows.values.ndim - 1))
        largest = jnp.max(jnp.abs(rows.values), axis=tokens, initial=jnp.float32(0))
        return ChannelAbsMax(largest, rows.tokens)

    def merge(a: ChannelAbsMax, b: ChannelAbsMax) -> ChannelAbsMax:
        largest = jnp.maximum(a.largest, b.largest)
        return ChannelAbsMax(largest, a.tokens + b.tokens)

    return summary(init, see, merge)
