"""A layer with correlated inputs, and what a Gram matrix makes of an error."""

import jax.numpy as jnp
import numpy as np

from jaxq.solvers import Statistics


def inputs(rng, tokens, rows, correlation=0.9, spread=0.7):
    """Activations ``[tokens, rows]``: correlated, of log-normal sizes."""
    mix = np.eye(rows) + correlation * rng.standard_normal((rows, rows)) / rows**0.5
    sizes = np.exp(spread * rng.standard_normal(rows))
    return (rng.standard_normal((tokens, rows)) @ mix * sizes).astype(np.float32)


def statistics(x, drift=None):
    """What an observer says of activations ``[*stack, tokens, K]``."""
    x = np.asarray(x, np.float64)
    turned = np.swapaxes(x, -1, -2)
    moved = None if drift is None else np.swapaxes(drift, -1, -2) @ x
    return Statistics(
        jnp.asarray(turned @ x, jnp.float32),
        jnp.full(x.shape[:-2], x.shape[-2], jnp.int32),
        drift=None if moved is None else jnp.asarray(moved, jnp.float32),
    )


def loss(gram, error):
    """``tr(ΔᵀHΔ)`` in float64."""
    error = np.asarray(error, np.float64)
    return float(np.sum(error * (np.asarray(gram, np.float64) @ error)))
