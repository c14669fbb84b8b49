"""Signed and unsigned integers of 2 to 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.formats.base import Format
from pallas_kernels.kernel import Coding


@dataclasses.dataclass(frozen=True)
class IntegerFormat(Format):
    """Integers ``-2^(b-1) .. 2^(b-1)-1`` (signed) or ``0 .. 2^b-1``.

    Signed codes below 8 bits are stored as ``value + 2^(b-1)`` (one subtraction to
    decode); int8 is stored in two's complement, so that integer matrix products take
    the bytes as they are.
    """

    signed: bool = True

    @property
    def lowest(self) -> float:
        """The smallest integer."""
        return float(-(2 ** (self.bits - 1)) if self.signed else 0)

    @property
    def highest(self) -> float:
        """The largest integer."""
        return float(2 ** (self.bits - self.signed) - 1)

    @property
    def is_integer(self) -> bool:
        """Always true."""
        return True

    def coding(self, pack: int) -> Coding:
        """Return what a kernel must know of codes packed in blocks of ``pack`` rows."""
        return Coding("integer", self.bits, pack, int(self.lowest))

    def encode(self, x: jax.Array) -> jax.Array:
        """Round half to even, saturate."""
        value = jnp.clip(jnp.round(x), self.lowest, self.highest).astype(jnp.int32)
        if self.signed and self.bits == 8:
            return lax.bitcast_convert_type(value.astype(jnp.int8), jnp.uint8)
        return (value - int(self.lowest)).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the integers, exactly, in ``dtype`` (float or int)."""
        if self.signed and self.bits == 8:
            return lax.bitcast_convert_type(codes, jnp.int8).astype(dtype)
        if not self.signed:
            return codes.astype(dtype)
        return codes.astype(dtype) - jnp.asarray(-int(self.lowest), dtype)
