"""Floating point of 8 and 4 bits: a code is a sign, an exponent and a mantissa."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.formats.base import Format
from jaxq.formats.codebook import CodebookFormat
from pallas_kernels.kernel import Coding


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

    def coding(self, pack: int) -> Coding:
        """Return what a kernel must know of codes packed in blocks of ``pack`` rows."""
        return Coding(self.dtype, 8, pack)

    def encode(self, x: jax.Array) -> jax.Array:
        """Clip to the finite range, round, and take the bits."""
        return lax.bitcast_convert_type(
            jnp.clip(x, self.lowest, self.highest).astype(self.dtype), jnp.uint8
        )

    def decode(self, codes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the numbers of the bit patterns."""
        info = jnp.finfo(self.dtype)
        bias = 1 - info.minexp
        values = _read(codes, 8, info.nmant, bias)
        if info.maxexp + bias == 2**info.nexp:
            # e4m3fn spends its largest exponent on numbers; only its last code is NaN
            values = jnp.where((codes & 0x7F) == 0x7F, jnp.float32(jnp.nan), values)
        return values.astype(dtype)


@dataclasses.dataclass(frozen=True)
class FourBitFloatFormat(CodebookFormat):
    """fp4 e2m1 (OCP Microscaling v1.0): rounds like its table, decodes like a float."""

    def decode(self, codes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the numbers of the bit patterns."""
        return _read(codes, 4, 1, 1).astype(dtype)


def _read(codes: jax.Array, bits: int, mantissa: int, bias: int) -> jax.Array:
    """Return the float32 numbers of floating point codes, subnormal ones included.

    Moved to the places of a float16, the bits stand for ``2^(bias - 15)`` times the
    number. That is exact, and converts to float32 in one vector instruction; XLA:CPU's
    own conversion from 8 bits takes a dozen, a table of 16 numbers fifteen selects.
    """
    wide = codes.astype(jnp.uint16)
    sign = (wide >> (bits - 1)) << 15
    magnitude = (wide & (2 ** (bits - 1) - 1)) << (10 - mantissa)
    half = lax.bitcast_convert_type(sign | magnitude, jnp.float16)
    return half.astype(jnp.float32) * 2.0 ** (15 - bias)
