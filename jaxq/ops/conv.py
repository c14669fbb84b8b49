"""Convolution with a quantized kernel."""

from typing import Any

import jax
from jax import lax

from jaxq.ops.activation import quantized_input
from jaxq.ops.dispatch import Choice
from jaxq.qtensor import QTensor


def conv_general_dilated(
    x: jax.Array, w: QTensor, **params: Any
) -> tuple[jax.Array, Choice]:
    """Return ``lax.conv_general_dilated`` with the kernel dequantized first.

    Convolution kernels are small beside their activations, so this costs little; the
    activation is quantized and read back when the weight asks for it. Its scale is the
    stored one, or one for all of it, or one per sample (a token here is a sample).
    """
    reason = "no fused convolution"
    if w.activation is not None:
        sample = params["dimension_numbers"].lhs_spec[0]
        x = quantized_input(x, w, [i for i in range(x.ndim) if i != sample])
        reason += "; activation quantized and read back"
    y = lax.conv_general_dilated_p.bind(x, w.dequantize(), **params)
    return y, Choice("xla.dequantize_conv", (("fused", reason),))
