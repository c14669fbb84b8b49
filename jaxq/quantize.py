"""Arrays to `QTensor`s and back: the steps every solver shares."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.binary import binary_coded, interleaved
from jaxq.blocks import block_axes, block_shape, spread, to_blocks
from jaxq.qtensor import QTensor
from jaxq.scales import affine, divide, round_scale, store_scale, to_code_units
from jaxq.spec import QuantSpec
from pallas_kernels import layouts

Axes = int | Sequence[int] | None
Bounds = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Where a tensor's blocks lie: its block sizes, contracted and stacked axes.

    Attributes:
        block: block size along each axis.
        contracting: the contracted axes, ascending, non-negative.
        stacked: axes that enumerate independent tensors.
    """

    block: tuple[int, ...]
    contracting: tuple[int, ...]
    stacked: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        spec: QuantSpec,
        shape: Sequence[int],
        axis: Axes = None,
        stacked: Sequence[int] = (),
    ) -> "Blocking":
        """Return the blocks of ``spec`` on a tensor of ``shape``.

        Raises:
            ValueError: when an axis is out of range or named twice, or the tensor is a
                scalar or empty.
        """
        contracting = contracting_axes(spec, len(shape), axis)
        if spec.outliers is not None:
            raise ValueError(
                f"outliers={spec.outliers:g} is about the activation of a product, not "
                f"a tensor by itself: give it as activation=, and leave it out here"
            )
        if 0 in shape:
            raise ValueError(
                f"a tensor of shape {tuple(shape)} has no elements to quantize"
            )
        stacked = _normalized(stacked, len(shape), "stacked")
        if set(stacked) & set(contracting):
            raise ValueError(
                f"stacked={stacked!r} overlaps the contracted axes {contracting}: an "
                f"axis enumerates tensors or is summed over, not both"
            )
        block = block_shape(spec.block, shape, contracting, stacked)
        return cls(block, contracting, stacked)


def contracting_axes(spec: QuantSpec, ndim: int, axis: Axes) -> tuple[int, ...]:
    """Return the contracted axes: as given, else -2 (kernels), -1 (tokens, vectors)."""
    if ndim == 0:
        raise ValueError("a scalar cannot be quantized: it has no axis to group along")
    if axis is None:
        axis = -1 if ndim == 1 or spec.block == "token" else -2
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes:
        raise ValueError(
            f"axis={axis!r} names no axis: give one or more in {-ndim}..{ndim - 1}"
        )
    return _normalized(axes, ndim, "axis")


def _normalized(axes: Sequence[int], ndim: int, name: str) -> tuple[int, ...]:
    """Return distinct axes, ascending and counted from the front."""
    if any(not -ndim <= a < ndim for a in axes):
        given = axes[0] if name == "axis" and len(axes) == 1 else tuple(axes)
        raise ValueError(
            f"{name}={given!r} does not name axes of a tensor of rank {ndim}: give "
            f"axes in {-ndim}..{ndim - 1}"
        )
    out = tuple(sorted({a % ndim for a in axes}))
    if len(out) < len(axes):
        raise ValueError(f"{name}={tuple(axes)!r} names an axis twice")
    return out


def block_bounds(x: jax.Array, block: Sequence[int]) -> Bounds:
    """Return the smallest and largest value of every block, float32."""
    blocks = to_blocks(x.astype(jnp.float32), block)
    axes = block_axes(x.ndim)
    return jnp.min(blocks, axes), jnp.max(blocks, axes)


def quantize(
    x: jax.Array,
    spec: QuantSpec,
    axis: Axes = None,
    *,
    stacked: Sequence[int] = (),
    bounds: Bounds | None = None,
) -> QTensor:
    """Round ``x`` to the nearest codes: ``q = clip(⌊x / s⌉ + z)``.

    Args:
        x: any float array of rank 1 or more.
        spec: format, blocks and scales.
        axis: the contracted axis or axes, along which groups run; by default -2 (a
            Flax kernel ``[in, out]``), -1 for vectors and ``block="token"``.
        stacked: axes that enumerate independent tensors (layers, experts).
        bounds: the range (low, high) of each block; by default its extremes. A tighter
            range clips.

    Returns:
        A `QTensor` of the same logical shape and dtype. An axis that the group does not
        divide is padded.

    Raises:
        ValueError: on a scalar, a bad axis, or a tile without a free axis.

    Example:
        >>> import jax.numpy as jnp
        >>> quantize(jnp.eye(128, 4), QuantSpec("int4", block=64)).bits_per_weight
        4.5
    """
    x = jnp.asarray(x)
    if spec.binary and not spec.symmetric:
        plain = dataclasses.replace(spec, binary=False)
        return binary_coded(quantize(x, plain, axis, stacked=stacked, bounds=bounds))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"only float arrays can be quantized, got dtype {x.dtype.name}"
        )
    where = Blocking.of(spec, x.shape, axis, stacked)
    values, offset = x.astype(jnp.float32), None
    if spec.center:
        kept = tuple(i for i in range(x.ndim) if i not in where.stacked)
        offset = jnp.mean(values, kept, keepdims=True)
        values = values - offset
    low, high = block_bounds(values, where.block) if bounds is None else bounds
    if spec.binary:
        return _even_signs(values, (low, high), spec, where, x.dtype)
    scale, zero = affine(low, high, spec)
    scales, scale = settle_scale(scale, spec, where)
    codes = encode(values, scale, zero, spec, where.block)
    return assemble(codes, scales, zero, spec, where, dtype=x.dtype, offset=offset)


def _even_signs(
    x: jax.Array, bounds: Bounds, spec: QuantSpec, where: Blocking, dtype: jnp.dtype
) -> QTensor:
    """Return sums of signs that are evenly spaced around 0: ``α_i = 2^i α_0``."""
    steps = 2**spec.bits - 1
    largest = jnp.maximum(jnp.abs(bounds[0]), jnp.abs(bounds[1]))
    least = round_scale(divide(largest, steps), spec)
    wide = spread(jnp.where(least == 0, jnp.float32(1), least), where.block, x.shape)
    codes = jnp.clip(jnp.round((divide(x, wide) + steps) / 2), 0, steps)
    powers = 2.0 ** jnp.arange(spec.bits, dtype=jnp.float32)
    planes = powers.reshape(-1, *(1,) * least.ndim) * least
    scales = interleaved(planes, where.contracting[-1])
    stored = store_scale(scales, str(spec.scale))
    return assemble(codes.astype(jnp.uint8), stored, None, spec, where, dtype=dtype)


def settle_scale(
    scale: jax.Array, spec: QuantSpec, where: Blocking
) -> tuple["jax.Array | QTensor", jax.Array]:
    """Return the scales as stored (maybe quantized themselves) and as read back."""
    if isinstance(spec.scale, str):
        return store_scale(scale, spec.scale), scale
    matrix = [i for i in range(scale.ndim) if i not in where.stacked]
    stored = quantize(scale, spec.scale, matrix, stacked=where.stacked)
    return stored, stored.dequantize(jnp.float32)


def encode(
    x: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    spec: QuantSpec,
    block: Sequence[int],
) -> jax.Array:
    """Return the nearest uint8 code of every element, for given scales and zeros."""
    scale = spread(scale, block, x.shape)
    zero = None if zero is None else spread(zero, block, x.shape)
    return spec.number_format.encode(to_code_units(x, scale, zero, spec))


def assemble(
    codes: jax.Array,
    scales: "jax.Array | QTensor",
    zeros: jax.Array | None,
    spec: QuantSpec,
    where: Blocking,
    *,
    dtype: jnp.dtype,
    offset: jax.Array | None = None,
) -> QTensor:
    """Pack unpacked codes and put a `QTensor` together.

    Args:
        codes: uint8, one per element of the tensor.
        scales: one per block, as stored; binary-coded, one per bit of every block.
        zeros: one per block (float32 holding integers), or None.
        spec: how the codes were chosen.
        where: the blocks.
        dtype: of the tensor that was quantized.
        offset: float32 of the same rank, or None.

    Raises:
        ValueError: when a binary-coded spec gets one scale per block.
    """
    axis = where.contracting[-1]
    length = codes.shape[axis]
    if spec.binary:
        _check_scales_of_bits(scales, spec, length, where.block[axis], axis)
    padded = padded_length(length, where.block[axis], spec.bits)
    if padded != length:
        pad = [(0, 0)] * codes.ndim
        pad[axis] = (0, padded - length)
        codes = jnp.pad(codes, pad)
    pack = layouts.pack_block(padded, spec.bits, where.block[axis])
    if zeros is not None:
        signed = spec.number_format.lowest < 0
        zeros = zeros.astype(jnp.int8 if signed else jnp.uint8)
    return QTensor(
        layouts.pack(codes, spec.bits, axis, pack),
        scales,
        zeros,
        offset,
        spec=spec,
        axis=axis - codes.ndim,
        pack=pack,
        padding=padded - length,
        block=where.block,
        dtype=jnp.dtype(dtype),
    )


def _check_scales_of_bits(
    scales: "jax.Array | QTensor", spec: QuantSpec, length: int, block: int, axis: int
) -> None:
    """Raise unless there is a scale for every bit of a block."""
    if scales.shape[axis] != -(-length // block) * spec.bits:
        raise ValueError(
            f"{spec.describe()} has a scale per bit, and what rounds here chooses one "
            f"per block: use the solver 'bcq' or 'rtn', or leave binary=False and "
            f"convert the result with jaxq.binary_coded"
        )


def padded_length(length: int, block: int, bits: int) -> int:
    """Return ``length`` rounded up to whole blocks of whole bytes."""
    unit = 1 if bits == 8 else 8
    if block < length:
        unit = math.lcm(unit, block)
    return -(-length // unit) * unit


def dequantize(q: QTensor, dtype: jnp.dtype | None = None) -> jax.Array:
    """Return the float array that ``q`` stands for; see `QTensor.dequantize`."""
    if not isinstance(q, QTensor):
        raise TypeError(f"dequantize takes a QTensor, got {type(q).__name__}")
    return q.dequantize(dtype)


def fake_quant(x: jax.Array, spec: QuantSpec, axis: Axes = None) -> jax.Array:
    """Return ``dequantize(quantize(x))`` with the straight-through gradient.

    The forward value is exactly the quantized one; the gradient is the identity
    (Bengio et al. 2013), since the range covers all values and nothing is clipped.

    Args:
        x: any float array of rank 1 or more.
        spec: format, blocks and scales.
        axis: the contracted axes, as in `quantize`.

    Example:
        >>> import jax.numpy as jnp
        >>> fake_quant(jnp.asarray([0.0, 0.4, 1.0]), QuantSpec("int2")).tolist()
        [0.0, 0.0, 1.0]
    """
    rounded = quantize(jax.lax.stop_gradient(x), spec, axis).dequantize()
    # exactly 0, with gradient 1: x + (rounded - x) would round a second time
    identity = x - jax.lax.stop_gradient(x)
    return jax.lax.stop_gradient(rounded) + identity
