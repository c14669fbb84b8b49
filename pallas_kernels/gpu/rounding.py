"""Activations rounded to int8 or fp8 before a product: XLA's part of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.epilogue import finished
from pallas_kernels.kernel import Operands, Problem

MOST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def round_to(x: jax.Array, units: jax.Array, rounded: str) -> jax.Array:
    """Return ``x / units`` rounded to int8 or fp8, saturating."""
    units = jnp.where(units == 0, jnp.float32(1), units)[:, None]
    x = x.astype(jnp.float32) / units
    if rounded == "int8":
        x = jnp.round(x)
    return jnp.clip(x, -MOST[rounded], MOST[rounded]).astype(rounded)


def scaled_input(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Return ``x · scale``, one per channel, in the dtype of ``x``.

    XLA does it where ``x`` is made: a kernel gets ``x`` into shared memory, from where
    tensor cores read it, and no thread ever holds it.
    """
    if scale is None:
        return x
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rows:
    """An activation for a product of floats, and what is to be done to its result.

    What int8 and fp8 hold bfloat16 holds too, so nothing is rounded twice: a product
    that no integer or fp8 kernel takes is exact in the kernels for floats. Its result
    is scaled per row, and only then biased.

    Attributes:
        problem: the facts.
        x: ``[M, K]``.
        options: of the kernel.
        units: by what to scale the result, or None when the kernel finishes it.
        later: bias and epilogue that then remain.
    """

    problem: Problem
    x: jax.Array
    options: dict[str, Any]
    units: jax.Array | None = None
    later: tuple[jax.Array | None, str | None] = (None, None)

    @classmethod
    def of(
        cls,
        p: Problem,
        a: Operands,
        bias: jax.Array | None = None,
        input_scale: jax.Array | None = None,
        epilogue: str | None = None,
    ) -> "Rows":
        """Round the activation of a problem, if it asks for that.

        Raises:
            ValueError: when the activation is to be rounded, and its scale is missing.
        """
        if p.activation is None:
            options = {"bias": bias, "input_scale": input_scale, "epilogue": epilogue}
            return cls(p, a.x, {**options, "out_dtype": p.out_dtype})
        if a.x_scale is None:
            raise ValueError(f"an activation in {p.activation} needs its x_scale")
        units = a.x_scale.astype(jnp.float32)
        x = round_to(scaled_input(a.x, input_scale), units[:, 0], p.activation)
        options = {"out_dtype": jnp.float32}
        return cls(p, x.astype(jnp.bfloat16), options, units, (bias, epilogue))

    def finished(self, y: jax.Array) -> jax.Array:
        """Return the result in its own units and dtype."""
        if self.units is None:
            return y
        return finished(y * self.units, *self.later).astype(self.problem.out_dtype)
