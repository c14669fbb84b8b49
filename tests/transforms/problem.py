"""Weights that share an activation, and the figures that transforms are judged by."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxq.transforms import Transform


class Problem(NamedTuple):
    """An activation and its consumers, float64."""

    x: np.ndarray
    weights: tuple[np.ndarray, ...]

    @property
    def arrays(self) -> tuple[jnp.ndarray, ...]:
        """The weights as transforms take them."""
        return tuple(jnp.asarray(w, jnp.float32) for w in self.weights)

    def statistics(self, row: Transform) -> list[jnp.ndarray]:
        """What a row needs to know of the activation."""
        size = np.abs(self.x)
        known = {
            "absmax": jnp.asarray(size.max(-2), jnp.float32),
            "magnitude": jnp.asarray(size.sum(-2), jnp.float32),
            "tokens": jnp.full(size.shape[:-2], size.shape[-2], jnp.int32),
        }
        return [known[name] for name in row.needs]


def problem(
    rng: np.random.Generator,
    inner: int = 48,
    outputs: Sequence[int] = (16, 24),
    stack: Sequence[int] = (),
    spread: float = 1.0,
    tokens: int = 64,
) -> Problem:
    """Normal weights and tokens; channels of log-normal size."""
    size = np.exp(spread * rng.standard_normal((*stack, 1, inner)))
    x = rng.standard_normal((*stack, tokens, inner)) * size
    return Problem(x, tuple(rng.standard_normal((*stack, inner, n)) for n in outputs))


def mse(y: np.ndarray, want: np.ndarray) -> float:
    """The mean squared error, relative to the mean square of what is wanted."""
    return float(np.mean((y - want) ** 2) / np.mean(want**2))
