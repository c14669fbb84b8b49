"""Scales: from the range of a block to a stored scale and zero point."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.formats import FORMATS
from jaxq.spec import QuantSpec

_FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def affine(
    low: jax.Array, high: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array | None]:
    """Return the ideal scale and zero point for blocks whose values lie in [low, high].

    Symmetric, with ``a = max(|low|, |high|)``: ``s = a / highest`` (restricted),
    ``2a / (2^b − 1)`` (gptq), the signed extreme over ``−2^(b−1)`` (full). Asymmetric,
    with 0 taken into the range: ``s = (high − low) / (2^b − 1)`` and
    ``z = clip(⌊lowest − low/s⌉)``. A power-of-two scale (e8m0) is
    ``2^(⌊log2 a⌋ − ⌊log2 highest⌋)`` (OCP Microscaling v1.0, section 6.3), or what
    ``spec.exponent`` says.

    Args:
        low: the smallest value of each block, float32, any shape.
        high: the largest, same shape.
        spec: how the tensor is quantized.

    Returns:
        Scales (float32, not yet rounded to their storage) and zero points (float32
        holding integers) or None. A block of zeros has scale 0.
    """
    fmt = spec.number_format
    if not spec.symmetric:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scale = divide(high - low, fmt.highest - fmt.lowest)
        scale = round_scale(scale, spec)
        zero = jnp.round(fmt.lowest - divide(low, _nonzero(scale)))
        return scale, jnp.clip(zero, fmt.lowest, fmt.highest)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    if fmt.is_integer and fmt.lowest == 0:
        largest = jnp.maximum(high, 0.0)
    if spec.scale == "e8m0":
        return _power_of_two(largest, spec), None
    if spec.grid == "gptq":
        scale = divide(2 * largest, 2**fmt.bits - 1)
    elif spec.grid == "full":
        scale = jnp.where(jnp.abs(low) >= jnp.abs(high), low, high) / fmt.lowest
    else:
        scale = divide(largest, fmt.highest)
    return round_scale(scale, spec), None


def static_affine(
    low: jax.Array, high: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array | None]:
    """Return what is kept of an activation's range: one scale, maybe a zero point.

    As `affine`; where scales are quantized in turn, the scale of the scales that lets
    the largest block have the largest code, as ``spec.scale`` stores it.
    """
    scale, zero = affine(low, high, spec)
    if zero is not None:
        zero = zero.astype(jnp.int8 if spec.number_format.lowest < 0 else jnp.uint8)
    if not isinstance(spec.scale, QuantSpec):
        return scale, zero
    world, _ = affine(jnp.zeros_like(scale), scale, spec.scale)
    return store_scale(world, str(spec.scale.scale)), zero


def round_scale(scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the scales as they will read back from storage (plain dtypes only).

    Codes are chosen for the stored scale, not the ideal one, so that its rounding error
    is absorbed. Scales that are themselves quantized are rounded by the caller.
    """
    if isinstance(spec.scale, QuantSpec):
        return scale
    return load_scale(store_scale(scale, spec.scale), spec.scale)


def store_scale(scale: jax.Array, dtype: str) -> jax.Array:
    """Return float32 scales in their storage: a float dtype, or uint8 bit patterns."""
    if dtype in _FLOAT_DTYPES:
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(scale, -largest, largest).astype(dtype)
    if dtype == "e4m3":
        return FORMATS["fp8_e4m3"].encode(scale)
    if dtype == "inverse_float32":
        return divide(jnp.ones_like(scale, jnp.float32), scale)
    bits = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    return ((bits >> 23) & 0xFF).astype(jnp.uint8)


def load_scale(stored: jax.Array, dtype: str) -> jax.Array:
    """Invert `store_scale`: float32 scales."""
    if dtype in _FLOAT_DTYPES:
        return stored.astype(jnp.float32)
    if dtype == "e4m3":
        return FORMATS["fp8_e4m3"].decode(stored)
    if dtype == "inverse_float32":
        return divide(jnp.ones_like(stored, jnp.float32), stored)
    # 2^(e − 127); the exponent 0 is a subnormal number in float32
    bits = jnp.where(
        stored == 0, jnp.uint32(0x00400000), stored.astype(jnp.uint32) << 23
    )
    return lax.bitcast_convert_type(bits, jnp.float32)


def _power_of_two(largest: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the power-of-two scale of blocks whose largest magnitude is given."""
    highest = spec.number_format.highest
    if spec.exponent == "ceil":
        return power_of_two_floor(divide(largest, highest), up_from=1.0 + 2.0**-23)
    power = power_of_two_floor(largest, 1.75 if spec.exponent == "near" else 2.0)
    return power * 2.0 ** -math.floor(math.log2(highest))


def power_of_two_floor(x: jax.Array, up_from: float = 2.0) -> jax.Array:
    """Return ``2^⌊log2 x⌋`` of positive float32, exactly, and 0 of 0.

    Where ``x`` is at least ``up_from`` times that, it is doubled.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = bits + jnp.uint32(int((2.0 - up_from) * 2**23))  # carries into the exponent
    return lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """Return ``x / y`` of float32, rounded once, compiled or not.

    XLA turns a division by a constant or a broadcast into a product with the
    reciprocal, which rounds twice. A divisor that seems to depend on ``x`` stays one.
    """
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(y, jnp.float32))


def rounded(product: jax.Array) -> jax.Array:
    """Return ``product`` as it is, but rounded before it is added to anything.

    Compiled, a product that is only added would become a fused multiply-add, and differ
    from the same thing run eagerly.
    """
    return jnp.where(jnp.isnan(product), jnp.float32(jnp.nan), product)


def _nonzero(scale: jax.Array) -> jax.Array:
    """Return the scale to divide by: 1 where a block is all zeros."""
    return jnp.where(scale == 0, jnp.float32(1), scale)


def to_code_units(
    x: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
    """Return ``x / scale + zero`` clipped to the spec's code range, not rounded.

    ``scale`` and ``zero`` are spread over (or broadcast with) ``x``. Division is exact:
    a reciprocal would drift by a rounding at ties.
    """
    value = divide(x.astype(jnp.float32), _nonzero(scale))
    if zero is not None:
        value = jnp.round(value) + zero.astype(jnp.float32)
    return jnp.clip(value, *spec.code_range)
