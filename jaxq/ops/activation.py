"""The activation side of a product: quantize it as the weight asks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.qtensor import QTensor
from jaxq.quantize import (
    Axes,
    Blocking,
    Bounds,
    assemble,
    block_bounds,
    encode,
    quantize,
)
from jaxq.scales import affine, divide
from jaxq.spec import QuantSpec


def picked_input(x: jax.Array, w: QTensor) -> tuple[jax.Array, QTensor]:
    """Gather the channels that the stored rows meet: ``x @ w = x[:, index] @ stored``.

    Args:
        x: ``[M, K]``.
        w: ``[K, N]``; its ``input_index`` is ``[K', 1]``.
    """
    if w.input_index is None:
        return x, w
    x = take_columns(x, w.input_index[:, 0])
    return x, dataclasses.replace(w, input_index=None, rows=None)


def take_columns(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return ``x[:, index]``; an index that is out of range makes a column of NaNs."""
    # XLA:CPU gathers rows of the transpose, folds the transposition into a product that
    # follows, and has none of that kind in bfloat16
    return lax.optimization_barrier(jnp.take(x, index, axis=1))


def scaled_input(x: jax.Array, w: QTensor) -> tuple[jax.Array, QTensor]:
    """Move the weight's input scale to the activation: ``x @ (s · w) = (x · s) @ w``.

    Args:
        x: ``[M, K]``.
        w: ``[K, N]``; its ``input_scale`` is ``[K or 1, 1]``.
    """
    if w.input_scale is None:
        return x, w
    scale = jnp.broadcast_to(w.input_scale, (w.shape[0], 1))[:, 0]
    x = (x.astype(jnp.float32) * scale).astype(x.dtype)
    return x, dataclasses.replace(w, input_scale=None)


def static_or_dynamic(
    x: jax.Array, w: QTensor, spec: QuantSpec, axis: Axes = -1
) -> QTensor:
    """Quantize ``x`` per token or per tensor, with the stored scale if there is one.

    A static scale is the largest magnitude the code range stands for, divided by the
    largest code; values beyond it saturate. With a static zero point z the range is
    ``scale · (lowest − z) … scale · (highest − z)``.

    Args:
        x: ``[M, K]``, or whatever ``axis`` fits.
        w: the weight, with its ``activation_scale``: one number, or whatever broadcasts
            with the blocks of ``x``.
        spec: how to quantize.
        axis: the contracted axes of ``x``.

    Raises:
        ValueError: when there is a static zero point, and ``spec`` is symmetric.
    """
    if w.activation_scale is None:
        return quantize(x, spec, axis)
    if isinstance(spec.scale, QuantSpec):
        return _in_two_levels(x, w, spec, axis)
    return quantize(x, spec, axis, bounds=_static_bounds(w, spec, x.ndim))


def _in_two_levels(x: jax.Array, w: QTensor, spec: QuantSpec, axis: Axes) -> QTensor:
    """Quantize ``x`` with scales of its own, and those with the weight's static scale.

    Of a block whose largest magnitude is a, with h the largest code and g the static
    number, the scale is ``s = fp8(a / h / g) · g``, or with a divisor (inverse_float32)
    ``s = fp8(a / h · g) / g``.
    """
    inner = spec.scale
    assert isinstance(inner, QuantSpec)
    where = Blocking.of(spec, x.shape, axis)
    ideal, zero = affine(*block_bounds(x, where.block), spec)
    world = _fitting(jnp.asarray(w.activation_scale), x.ndim)
    divides = inner.scale == "inverse_float32"
    codes = ideal * world if divides else divide(ideal, world)
    # one static number for all, or (ragged experts) one per token
    shared = tuple(
        n if m == 1 else 1 for n, m in zip(ideal.shape, world.shape, strict=True)
    )
    scales = assemble(
        inner.number_format.encode(codes),
        world,
        None,
        inner,
        Blocking(shared, where.contracting),
        dtype=jnp.dtype(jnp.float32),
    )
    scale = scales.dequantize(jnp.float32)
    values = encode(x.astype(jnp.float32), scale, zero, spec, where.block)
    return assemble(values, scales, zero, spec, where, dtype=x.dtype)


def _fitting(a: jax.Array, rank: int) -> jax.Array:
    """Return a single number with the rank of the activation; others as they are."""
    return a.reshape((1,) * rank) if a.size == 1 else a


def row_scale(x: jax.Array, w: QTensor, spec: QuantSpec) -> jax.Array:
    """Return the scales by which `static_or_dynamic` would quantize ``x[M, K]``.

    Returns:
        float32 ``[M, 1]``.
    """
    if w.activation_scale is None:
        bounds = block_bounds(x, Blocking.of(spec, x.shape, -1).block)
    else:
        bounds = _static_bounds(w, spec, x.ndim)
    scale, _ = affine(*bounds, spec)
    return jnp.broadcast_to(scale.reshape(-1, 1), (x.shape[0], 1))


def with_static_scales(w: QTensor, fit: Callable[[jax.Array], jax.Array]) -> QTensor:
    """Return ``w`` with its static scale and zero point as ``fit`` arranges them.

    Where there are several, one for each part of a stack, tokens have them: what was
    one block is then quantized per token.
    """
    if w.activation is None or w.activation_scale is None:
        return w
    scale, activation = fit(w.activation_scale), w.activation
    if scale.size > 1 and activation.block == "tensor":
        activation = dataclasses.replace(activation, block="token")
    return dataclasses.replace(
        w,
        activation=activation,
        activation_scale=scale,
        activation_zero=None if w.activation_zero is None else fit(w.activation_zero),
    )


def _static_bounds(w: QTensor, spec: QuantSpec, rank: int) -> Bounds:
    """Return the range that the weight's static scale stands for."""
    scale = jnp.abs(_fitting(jnp.asarray(w.activation_scale), rank))
    fmt = spec.number_format
    if w.activation_zero is None:
        return -scale * fmt.highest, scale * fmt.highest
    if spec.symmetric:
        raise ValueError(
            f"{w!r} has a zero point for its activation, which is {spec.describe()}: "
            f"leave activation_zero=None, or ask for symmetric=False"
        )
    zero = _fitting(w.activation_zero, rank).astype(jnp.float32)
    return scale * (fmt.lowest - zero), scale * (fmt.highest - zero)


def split_outliers(
    x: jax.Array, w: QTensor, spec: QuantSpec, axis: Axes = -1
) -> tuple[QTensor, jax.Array]:
    """Return the int8 part of ``x``, and the columns that are left to floats.

    A column is left out when any of its tokens has ``|x| ≥ spec.outliers``. The order
    is that of the official code: the scale of a token is the largest magnitude of its
    *elements* below the threshold, so what is small in an outlier column still counts;
    then the *columns* are zeroed (Dettmers et al. 2022, section 3.2). Since columns
    depend on all tokens of the call, so does the rounding of each.

    Args:
        x: ``[M, K]``, or whatever ``axis`` fits.
        w: the weight, with its ``activation_scale`` if that is static.
        spec: with a threshold.
        axis: the contracted axes of ``x``.

    Returns:
        ``x`` quantized with those columns 0, and ``bool`` columns, of the rank of ``x``
        and of length 1 along its tokens.

    Raises:
        ValueError: when the spec has no threshold.
    """
    if spec.outliers is None:
        raise ValueError(f"{spec.describe()} has no threshold: give outliers=6.0")
    large = jnp.abs(x) >= spec.outliers
    plain = dataclasses.replace(spec, outliers=None)
    where = Blocking.of(plain, x.shape, axis)
    tokens = tuple(i for i in range(x.ndim) if i not in where.contracting)
    columns = jnp.any(large, tokens, keepdims=True)
    if w.activation_scale is None:
        bounds = block_bounds(jnp.where(large, 0, x), where.block)
    else:
        bounds = _static_bounds(w, plain, x.ndim)
    return quantize(jnp.where(columns, 0, x), plain, axis, bounds=bounds), columns


def quantized_input(x: jax.Array, w: QTensor, axis: Axes = -1) -> jax.Array:
    """Return ``x`` as its quantized form reads back, or ``x`` when it stays float.

    Columns with outliers, when the weight asks for them to be kept, stay as they are.
    The gradient passes straight through, as in `jaxq.quantize.fake_quant`.
    """
    if w.activation is None:
        return x
    fixed = jax.lax.stop_gradient(x)
    if w.activation.outliers is None:
        read = static_or_dynamic(fixed, w, w.activation, axis).dequantize(x.dtype)
    else:
        part, columns = split_outliers(fixed, w, w.activation, axis)
        read = jnp.where(columns, fixed, part.dequantize(x.dtype))
    return jax.lax.stop_gradient(read) + (x - fixed)
