"""The Hessian of a layer's output error: damped, ordered and factored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.solvers.order import Order

# What damping grows to while the matrix cannot be factored: tenfold each time, at least
# the first of these and at most the second.
LEAST_RETRY, MOST_DAMPING = 1e-3, 1.0


class Curvature(NamedTuple):
    """The diagonal of a Gram matrix ``XᵀX``, and whether the matrix can be used.

    Attributes:
        diagonal: ``float32[K]``, in units of its mean over living rows; 0 of dead ones.
        unit: that mean; 1 when nothing is alive.
        usable: whether all elements are finite, no element of the diagonal is negative
            and some activation was not zero.
    """

    diagonal: jax.Array
    unit: jax.Array
    usable: jax.Array

    @property
    def dead(self) -> jax.Array:
        """Rows that no activation ever reached, ``bool[K]``."""
        return self.diagonal == 0


class Factor(NamedTuple):
    """The triangular factor of a damped Hessian.

    Attributes:
        lower: ``M`` with ``MᵀM = H + p · I``, lower triangular, float32, in units of
            the mean diagonal; the identity when ``ok`` is False.
        damping: ``p``, what was added to the diagonal, as a share of its mean.
        tries: how often a factorization was tried.
        ok: whether one succeeded.
    """

    lower: jax.Array
    damping: jax.Array
    tries: jax.Array
    ok: jax.Array


def curvature(gram: jax.Array) -> Curvature:
    """Return what the diagonal of a Gram matrix says.

    Args:
        gram: ``float32[K, K]``, ``XᵀX``.
    """
    diagonal = jnp.diagonal(gram)
    usable = jnp.all(jnp.isfinite(gram)) & jnp.all(diagonal >= 0)
    diagonal = jnp.where(usable, diagonal, jnp.float32(0))
    living = jnp.sum(diagonal > 0)
    mean = jnp.sum(diagonal) / jnp.maximum(living, 1).astype(jnp.float32)
    usable = usable & (living > 0) & jnp.isfinite(mean)
    unit = jnp.where(usable, mean, jnp.float32(1))
    return Curvature(jnp.where(usable, diagonal / unit, jnp.float32(0)), unit, usable)


def factor(
    gram: jax.Array, of: Curvature, order: Order, damping: float | jax.Array
) -> Factor:
    """Return ``M``, lower triangular, with ``MᵀM = H + p · I`` in the given order.

    With ``U = M⁻ᵀ`` this is the factor of GPTQ: ``UᵀU = H⁻¹``, ``U`` upper. It comes
    from one Cholesky factorization of the reversed matrix (``J H J = L Lᵀ`` gives
    ``M = (J L J)ᵀ``), where GPTQ's code factors, inverts and factors again.

    When it fails, ``p`` grows tenfold (``max(10 p, 0.001)``, at most 1), until it
    succeeds or ``p = 1`` has failed.

    Args:
        gram: ``float32[K, K]``, ``XᵀX``.
        of: its `curvature`.
        order: in which the rows will be rounded.
        damping: the first ``p``.
    """
    diagonal = jnp.arange(order.length)

    class State(NamedTuple):
        lower: jax.Array
        damping: jax.Array
        following: jax.Array
        tries: jax.Array
        ok: jax.Array

    def attempt(state: State) -> State:
        # inside the loop, or the matrix would be in memory once more; the first try
        # nearly always succeeds
        p, matrix = lax.optimization_barrier((state.following, gram))
        backwards = order.take(order.take(matrix), axis=1)[::-1, ::-1] / of.unit
        # a place without a row has a diagonal of 0, and gets 1 as dead rows do
        added = order.take(_ridge(of, p)) + order.filling().astype(jnp.float32)
        damped = backwards.at[diagonal, diagonal].add(added[::-1])
        lower = lax.linalg.cholesky(damped, symmetrize_input=False)
        ok = jnp.all(jnp.isfinite(jnp.diagonal(lower)))
        after = jnp.maximum(10 * p, jnp.float32(LEAST_RETRY))
        # beyond the limit only once the limit itself has failed
        after = jnp.where(p < MOST_DAMPING, jnp.minimum(after, MOST_DAMPING), after)
        return State(lower, p, after, state.tries + 1, ok)

    start = State(
        jnp.zeros((order.length,) * 2, jnp.float32),
        jnp.float32(0),
        jnp.asarray(damping, jnp.float32),
        jnp.int32(0),
        jnp.asarray(False),
    )
    end = lax.while_loop(
        lambda s: of.usable & ~s.ok & ((s.tries == 0) | (s.following <= MOST_DAMPING)),
        attempt,
        start,
    )
    identity = jnp.eye(order.length, dtype=jnp.float32)
    lower = jnp.where(end.ok, end.lower[::-1, ::-1].T, identity)
    return Factor(lower, end.damping, end.tries, end.ok)


def _ridge(of: Curvature, damping: jax.Array) -> jax.Array:
    """Return what damping adds to the diagonal, ``float32[K]``, in its units.

    A dead row gets 1: it is rounded to nearest, and has no part in the others. GPTQ's
    code sets its weights to zero; that saves nothing, and breaks the layer on the first
    input that is not dead.
    """
    return jnp.where(of.dead, jnp.float32(1), jnp.float32(0)) + damping
