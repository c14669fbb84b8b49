"""What may be done to a finished sum before it is written: bias and activation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda y: y,
    "relu": lambda y: jnp.maximum(y, 0.0),
    "silu": lambda y: y * jax.nn.sigmoid(y),
    "gelu": lambda y: jax.nn.gelu(y, approximate=True),
}


def activation(name: str | None) -> Callable[[jax.Array], jax.Array]:
    """Return an activation by its name.

    Raises:
        ValueError: when there is none of that name.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(repr(key) for key in ACTIVATIONS)
        raise ValueError(f"epilogue={name!r} must be one of {known}")
    return ACTIVATIONS[name]
