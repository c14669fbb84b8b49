"""8-bit floating point: the codes are the bit patterns of a native JAX dtype."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.formats.base import Format


@dataclasses.dataclass(frozen=True)
class MinifloatFormat(Format):
    """fp8 (OCP 8-bit floating point): round to nearest even, saturate at the largest.

    A cast of an out-of-range number to e4m3fn gives NaN, so numbers are clipped first.
    """

    dtype: str = "float8_e4m3fn"

    @property
    def lowest(self) -> float:
        """Minus the largest finite number."""
        return -self.highest

    @property
    def highest(self) -> float:
        """The largest finite number: 448 (e4m3fn), 57344 (e5m2)."""
        return float(jnp.finfo(self.dtype).max)

    def encode(self, x: jax.Array) -> jax.Array:
        """Clip to the finite range, round, and take the bits."""
        return lax.bitcast_convert_type(
            jnp.clip(x, self.lowest, self.highest).astype(self.dtype), jnp.uint8
        )

    def decode(self, codes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the numbers of the bit patterns."""
        return lax.bitcast_convert_type(codes, self.dtype).astype(dtype)
