"""The Hessian of a layer's output error: scaled, damped, ordered and factored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.solvers.order import Order

# What damping grows to while the matrix cannot be factored: tenfold each time, at least
# the first of these and at most the second.
LEAST_RETRY, MOST_DAMPING = 1e-3, 1.0


class Hessian(NamedTuple):
    """``H`` of one weight, in units of the mean of its diagonal.

    Attributes:
        matrix: ``float32[K, K]``; 1 on the diagonal of dead rows, the identity when
            the Gram matrix is not finite.
        unit: what was divided by (1 when nothing is alive).
        finite: whether every element of the Gram matrix is finite.
        alive: whether any activation was not zero.
    """

    matrix: jax.Array
    unit: jax.Array
    finite: jax.Array
    alive: jax.Array


class Factor(NamedTuple):
    """The triangular factor of a damped Hessian.

    Attributes:
        lower: ``M`` with ``MᵀM = H + damping · I``, lower triangular, float32; the
            identity when ``ok`` is False.
        damping: what was added to the diagonal, as a share of its mean.
        tries: how often a factorization was tried.
        ok: whether one succeeded.
    """

    lower: jax.Array
    damping: jax.Array
    tries: jax.Array
    ok: jax.Array


def hessian(gram: jax.Array) -> Hessian:
    """Return the Hessian of ``‖X(W − Q)‖²`` from ``gram = XᵀX``.

    A row of zeros (a dead channel: no activation was ever there) gets 1 on the
    diagonal, so that it is rounded to nearest and has no part in the others. GPTQ's
    code sets its weights to zero; that saves nothing, and breaks the layer on the
    first input that is not dead.

    Args:
        gram: ``float32[K, K]``, positive semidefinite.
    """
    finite = jnp.all(jnp.isfinite(gram))
    diagonal = jnp.where(finite, jnp.diagonal(gram), jnp.float32(0))
    dead = diagonal <= 0
    living = jnp.sum(~dead)
    unit = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.maximum(living, 1).astype(
        jnp.float32
    )
    unit = jnp.where(living > 0, unit, jnp.float32(1))
    either = dead[:, None] | dead[None, :]
    matrix = jnp.where(either, jnp.float32(0), gram / unit)
    matrix = matrix + jnp.diag(dead.astype(jnp.float32))
    return Hessian(matrix, unit, finite, living > 0)


def factor(h: Hessian, order: Order, damping: float) -> Factor:
    """Return ``M``, lower triangular, with ``MᵀM = H + p · I`` in the given order.

    With ``U = M⁻ᵀ`` this is the factor of GPTQ: ``UᵀU = H⁻¹``, ``U`` upper. It comes
    from one Cholesky factorization of the reversed matrix (``J H J = L Lᵀ`` gives
    ``M = (J L J)ᵀ``), where GPTQ's code factors, inverts and factors again.

    When it fails, ``p`` grows tenfold (``max(10 p, 0.001)``, at most 1), until it
    succeeds or ``p = 1`` has failed.

    Args:
        h: the Hessian.
        order: in which the rows will be rounded.
        damping: the first ``p``.
    """
    taken = order.take(order.take(h.matrix), axis=1)[::-1, ::-1]
    filling = order.filling()[::-1].astype(jnp.float32)
    identity = jnp.eye(order.length, dtype=jnp.float32)

    class State(NamedTuple):
        lower: jax.Array
        damping: jax.Array
        following: jax.Array
        tries: jax.Array
        ok: jax.Array

    def attempt(state: State) -> State:
        p = state.following
        damped = taken + jnp.diag(filling + p)
        lower = lax.linalg.cholesky(damped, symmetrize_input=False)
        ok = jnp.all(jnp.isfinite(jnp.diagonal(lower)))
        after = jnp.maximum(10 * p, jnp.float32(LEAST_RETRY))
        # beyond the limit only once the limit itself has failed
        after = jnp.where(p < MOST_DAMPING, jnp.minimum(after, MOST_DAMPING), after)
        return State(lower, p, after, state.tries + 1, ok)

    start = State(
        identity,
        jnp.float32(0),
        jnp.float32(damping),
        jnp.int32(0),
        jnp.asarray(False),
    )
    possible = h.finite & h.alive
    end = lax.while_loop(
        lambda s: possible & ~s.ok & ((s.following <= MOST_DAMPING) | (s.tries == 0)),
        attempt,
        start,
    )
    lower = jnp.where(end.ok, end.lower, identity)[::-1, ::-1].T
    return Factor(lower, end.damping, end.tries, end.ok)
