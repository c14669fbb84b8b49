"""What may be done to a sum before it is written: bias and activation."""

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


def finished(y: jax.Array, bias: jax.Array | None, name: str | None) -> jax.Array:
    """Return ``f(y + bias)``, in the dtype of ``y``; without a bias ``f(y)``.

    Raises:
        ValueError: when there is no activation of that name.
    """
    return activation(name)(y if bias is None else y + bias)
