"""Convolution with a quantized kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.ops.activation import quantized_input
from jaxq.ops.problem import Choice
from jaxq.qtensor import QTensor


def conv_general_dilated(
    x: jax.Array, w: QTensor, **params: Any
) -> tuple[jax.Array, Choice]:
    """Return ``lax.conv_general_dilated`` with the kernel dequantized first.

    Convolution kernels are small beside their activations, so this costs little; the
    activation is quantized and read back when the weight asks for it. Its scale is the
    stored one, or one for all of it, or one per sample (a token here is a sample).
    An input scale per channel is applied to it first, as in a matrix product.
    """
    reason = "no fused convolution"
    if w.activation is not None:
        x, w = _scaled_input(x, w, params)
        sample = params["dimension_numbers"].lhs_spec[0]
        x = quantized_input(x, w, [i for i in range(x.ndim) if i != sample])
        reason += "; activation quantized and read back"
    y = lax.conv_general_dilated_p.bind(x, w.dequantize(), **params)
    return y, Choice("xla.dequantize_conv", (("fused", reason),))


def _scaled_input(
    x: jax.Array, w: QTensor, params: dict[str, Any]
) -> tuple[jax.Array, QTensor]:
    """Move the kernel's input scale to the activation, if it is one per channel."""
    scale, numbers = w.input_scale, params["dimension_numbers"]
    if scale is None or params["feature_group_count"] > 1:
        return x, w
    if scale.size > scale.shape[numbers.rhs_spec[1]]:
        return x, w
    shape = [1] * x.ndim
    shape[numbers.lhs_spec[1]] = scale.size
    x = (x.astype(jnp.float32) * scale.reshape(shape)).astype(x.dtype)
    return x, dataclasses.replace(w, input_scale=None)
