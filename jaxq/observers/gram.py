"""The Gram matrix of an activation, the Hessian of its layer's squared error."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers.base import Observer, summary
from jaxq.observers.rows import Rows, observe, width

# How a Gram matrix is cut into strips of rows: products of fewer rows are slow.
LEAST_STRIP, MOST_STRIPS = 256, 8


class Gram(NamedTuple):
    """The second moments of an activation, and how many tokens were seen.

    Attributes:
        total: the raw sum ``Σ x xᵀ`` over tokens, ``float32[K, K]``. Never divided, so
            that states add.
        tokens: rows seen, int32.
    """

    total: jax.Array
    tokens: jax.Array


def gram() -> Observer:
    """Return the observer of ``Σ x xᵀ`` (GPTQ's ``H`` up to a factor).

    Everything is float32, products included: half precision would overflow at 256² and
    lose the small eigenvalues that solvers divide by.

    Example:
        >>> observer = gram()
        >>> state = observer.init(jax.ShapeDtypeStruct((2, 2), jnp.float32))
        >>> state = observer.update(state, jnp.asarray([[1.0, 2.0], [0.0, 1.0]]))
        >>> state.total.tolist(), int(state.tokens)
        ([[1.0, 2.0], [2.0, 5.0]], 2)
    """

    def init(like: jax.ShapeDtypeStruct) -> Gram:
        total = jnp.zeros((width(like),) * 2, jnp.float32)
        return Gram(total, jnp.zeros((), jnp.int32))

    def see(rows: Rows) -> Gram:
        return Gram(_square(rows.values), rows.tokens)

    def merge(a: Gram, b: Gram) -> Gram:
        return Gram(a.total + b.total, a.tokens + b.tokens)

    return summary(init, see, merge)


def cross_gram(
    x_float: jax.Array, x: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Return ``Σ (x_float − x) xᵀ`` over tokens: how far the activation has drifted.

    The sums of several batches, and of several devices, add (GPTAQ, Li et al. 2025,
    where it is ``ΔX Xᵀ``).

    Args:
        x_float: ``[..., K]``, the activation of the float model.
        x: ``[..., K]``, the same one after the quantized layers before it.
        mask: as in `jaxq.observers.base.Observer`.

    Returns:
        ``float32[K, K]``; rows are of the difference, columns of ``x``.

    Raises:
        ValueError: when the two differ in shape.

    Example:
        >>> x = jnp.asarray([[1.0, 2.0]])
        >>> cross_gram(x + jnp.asarray([[0.5, 0.0]]), x).tolist()
        [[0.5, 1.0], [0.0, 0.0]]
    """
    if x_float.shape != x.shape:
        raise ValueError(
            f"x_float has shape {x_float.shape} and x {x.shape}: both must be the "
            f"activation of the same tokens at the same site"
        )

    def see(rows: Rows, ahead: jax.Array) -> jax.Array:
        ahead = ahead.astype(jnp.float32).reshape(rows.values.shape)
        drift = jnp.where(rows.keep, ahead - rows.values, jnp.float32(0))
        return _outer(drift, rows.values)

    return observe(see, x, mask, jnp.asarray(x_float))


def _square(a: jax.Array) -> jax.Array:
    """Return ``Σ a aᵀ``, of wide activations only one half, and that twice.

    In strips of rows, each from the diagonal on: two strips are three quarters of the
    work, many are half of it, in smaller and smaller products.
    """
    size = a.shape[-1]
    count = min(size // LEAST_STRIP, MOST_STRIPS)
    if count < 2:
        return _outer(a, a)
    edges = [size * i // count for i in range(count + 1)]
    strips = [
        _outer(a[..., start:end], a[..., start:])
        for start, end in itertools.pairwise(edges)
    ]
    upper = [
        jnp.pad(strip, ((0, 0), (start, 0)))
        for strip, start in zip(strips, edges, strict=False)
    ]
    above = jnp.concatenate(upper)
    strip_of = np.searchsorted(edges, np.arange(size), side="right")
    return jnp.where(strip_of[:, None] <= strip_of[None, :], above, above.T)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``Σ a bᵀ`` over all axes but the last, in full float32."""
    tokens = tuple(range(a.ndim - 1))
    return lax.dot_general(
        a,
        b,
        ((tokens, tokens), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
