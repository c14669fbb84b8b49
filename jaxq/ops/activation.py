"""The activation side of a product: quantize it as the weight asks."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.qtensor import QTensor
from jaxq.quantize import quantize
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


def static_or_dynamic(x: jax.Array, w: QTensor, spec: QuantSpec) -> QTensor:
    """Quantize ``x[M, K]`` per token or per tensor, with the stored scale if there is one.

    A static scale is the largest magnitude the code range stands for, divided by the
    largest code; values beyond it saturate.
    """
    if w.activation_scale is None:
        return quantize(x, spec, axis=-1)
    largest = jnp.abs(w.activation_scale).reshape(1, 1) * spec.number_format.highest
    return quantize(x, spec, axis=-1, bounds=(-largest, largest))


def quantized_input(x: jax.Array, w: QTensor) -> jax.Array:
    """Return ``x`` as its quantized form reads back, or ``x`` when it stays float."""
    if w.activation is None:
        return x
    return static_or_dynamic(x, w, w.activation).dequantize(x.dtype)
