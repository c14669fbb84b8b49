"""The activation side of a product: quantize it as the weight asks."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.qtensor import QTensor
from jaxq.quantize import Axes, quantize
from jaxq.spec import QuantSpec


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
    largest code; values beyond it saturate.

    Args:
        x: ``[M, K]``, or whatever ``axis`` fits.
        w: the weight, with its ``activation_scale``.
        spec: how to quantize.
        axis: the contracted axes of ``x``.
    """
    if w.activation_scale is None:
        return quantize(x, spec, axis)
    scale = jnp.abs(w.activation_scale).reshape((1,) * x.ndim)
    largest = scale * spec.number_format.highest
    return quantize(x, spec, axis, bounds=(-largest, largest))


def quantized_input(x: jax.Array, w: QTensor, axis: Axes = -1) -> jax.Array:
    """Return ``x`` as its quantized form reads back, or ``x`` when it stays float.

    The gradient passes straight through, as in `jaxq.quantize.fake_quant`.
    """
    if w.activation is None:
        return x
    fixed = jax.lax.stop_gradient(x)
    read = static_or_dynamic(fixed, w, w.activation, axis).dequantize(x.dtype)
    return jax.lax.stop_gradient(read) + (x - fixed)
