"""The largest magnitude of an activation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import Bounds, Observer, honest, summary
from jaxq.observers.rows import Rows
from jaxq.spec import QuantSpec


class AbsMax(NamedTuple):
    """The largest magnitude, and how many tokens were seen.

    Attributes:
        largest: ``max |x|``, float32; 0 of nothing, NaN where NaN was seen.
        tokens: rows seen, int32.
    """

    largest: jax.Array
    tokens: jax.Array


def absmax() -> Observer:
    """Return the observer of ``max |x|`` over all elements and batches.

    Its range is ``±max |x|``: nothing is clipped.

    Example:
        >>> observer = absmax()
        >>> state = observer.init(jax.ShapeDtypeStruct((2, 2), jnp.float32))
        >>> x = jnp.asarray([[1.0, -3.0], [9.0, 9.0]])
        >>> observer.update(state, x, mask=jnp.asarray([True, False])).largest.tolist()
        3.0
    """

    def init(like: jax.ShapeDtypeStruct) -> AbsMax:
        return AbsMax(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def see(rows: Rows) -> AbsMax:
        largest = jnp.max(jnp.abs(rows.values), initial=jnp.float32(0))
        return AbsMax(largest, rows.tokens)

    def merge(a: AbsMax, b: AbsMax) -> AbsMax:
        return AbsMax(jnp.maximum(a.largest, b.largest), a.tokens + b.tokens)

    def bounds(state: AbsMax, spec: QuantSpec) -> Bounds:
        return honest(state, -state.largest, state.largest)

    return summary(init, see, merge, bounds)
