"""A layer with correlated inputs; GPTQ, OBQ and nearest-plane in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import FORMATS
from jaxq.quantize import quantize
from jaxq.solvers import Statistics
from tests import oracle


def inputs(rng, tokens, rows, correlation=0.9, spread=0.7):
    """Activations ``[tokens, rows]``: correlated, of log-normal sizes."""
    mix = np.eye(rows) + correlation * rng.standard_normal((rows, rows)) / rows**0.5
    sizes = np.exp(spread * rng.standard_normal(rows))
    return (rng.standard_normal((tokens, rows)) @ mix * sizes).astype(np.float32)


def statistics(x, drift=None):
    """What an observer says of activations ``[*stack, tokens, K]``."""
    x = np.asarray(x, np.float64)
    moved = None if drift is None else np.swapaxes(drift, -1, -2) @ x
    return Statistics(
        jnp.asarray(np.swapaxes(x, -1, -2) @ x, jnp.float32),
        jnp.full(x.shape[:-2], x.shape[-2], jnp.int32),
        drift=None if moved is None else jnp.asarray(moved, jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("spec", "axis", "stacked"))
def nearest_codes(w, spec, axis=(0,), stacked=()):
    """Round to nearest, compiled as a whole: op by op takes longer."""
    return quantize(w, spec, axis, stacked=stacked)


def loss(gram, error):
    """``tr(ΔᵀHΔ)`` in float64."""
    error = np.asarray(error, np.float64)
    return float(np.sum(error * (np.asarray(gram, np.float64) @ error)))


def damped(gram, share):
    """The Gram matrix with a share of its mean diagonal added."""
    gram = np.asarray(gram, np.float64)
    return gram + share * np.mean(np.diag(gram)) * np.eye(len(gram))


def rounder(q):
    """``(row, values) -> values``: the nearest number that a matrix ``q`` can hold."""
    scale = oracle.spread(oracle.scale_values(q), q.block, q.shape)
    zero = np.zeros(q.shape)
    if q.zeros is not None:
        zero = oracle.spread(np.asarray(q.zeros, np.float64), q.block, q.shape)
    every = np.arange(2**q.spec.bits, dtype="uint8")
    numbers = np.asarray(FORMATS[q.spec.format].decode(every), np.float64)
    low, high = q.spec.code_range
    numbers = np.unique(numbers[(numbers >= low) & (numbers <= high)])

    def nearest(row, x):
        held = (numbers[:, None] - zero[row]) * scale[row]
        return held[np.abs(held - x).argmin(0), np.arange(held.shape[1])]

    return nearest


def by_inverse(w, h, nearest, order):
    """Frantar et al.'s equations: errors are spread by the factor of the inverse."""
    w, out = w[order].astype(np.float64), np.zeros(w.shape)
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    for i, row in enumerate(order):
        out[row] = nearest(row, w[i])
        w[i:] -= np.outer(u[i, i:], (w[i] - out[row]) / u[i, i])
    return out


def by_brain_surgeon(w, h, nearest, order):
    """OBQ: after every row the inverse is downdated, in a fixed order."""
    w, out = w.astype(np.float64), np.zeros(w.shape)
    inverse = np.linalg.inv(h)
    for row in order:
        out[row] = nearest(row, w[row])
        error = (w[row] - out[row]) / inverse[row, row]
        w -= np.outer(inverse[row], error)
        inverse = inverse - np.outer(inverse[row], inverse[row]) / inverse[row, row]
        inverse[row, row] = 1.0
    return out


def by_nearest_plane(w, h, nearest, order):
    """Babai: the last row of a triangular system is rounded first."""
    back = order[::-1]
    r = np.linalg.cholesky(h[np.ix_(back, back)]).T  # hᵣ = rᵀr
    out, goal = np.zeros(w.shape), r @ w[back].astype(np.float64)
    for i in reversed(range(len(back))):
        rest = goal[i] - r[i, i + 1 :] @ out[back][i + 1 :]
        out[back[i]] = nearest(back[i], rest / r[i, i])
    return out
