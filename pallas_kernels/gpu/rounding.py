"""Activations rounded to int8 or fp8 before a product: XLA's part of it."""

import jax
import jax.numpy as jnp

from pallas_kernels.kernel import Operands, Problem

MOST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def round_to(x: jax.Array, units: jax.Array, rounded: str) -> jax.Array:
    """Return ``x / units`` rounded to int8 or fp8, saturating."""
    units = jnp.where(units == 0, jnp.float32(1), units)[:, None]
    x = x.astype(jnp.float32) / units
    if rounded == "int8":
        x = jnp.round(x)
    return jnp.clip(x, -MOST[rounded], MOST[rounded]).astype(rounded)


def rounded_rows(p: Problem, a: Operands) -> tuple[jax.Array, jax.Array | None]:
    """Return an activation for a product of floats, and by what to scale its result.

    What int8 and fp8 hold bfloat16 holds too, so nothing is rounded twice: a product
    that no integer or fp8 kernel takes is exact in the kernels for floats.

    Raises:
        ValueError: when the activation is to be rounded, and its scale is missing.
    """
    if p.activation is None:
        return a.x, None
    if a.x_scale is None:
        raise ValueError(f"an activation in {p.activation} needs its x_scale")
    units = a.x_scale.astype(jnp.float32)
    return round_to(a.x, units[:, 0], p.activation).astype(jnp.bfloat16), units


def scaled_rows(y: jax.Array, units: jax.Array | None, p: Problem) -> jax.Array:
    """Return the result of `rounded_rows` in its own units and dtype."""
    return (y if units is None else y * units).astype(p.out_dtype)
