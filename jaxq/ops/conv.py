"""Convolution with a quantized kernel."""

from typing import Any

import jax
from jax import lax

from jaxq.ops.dispatch import Choice
from jaxq.qtensor import QTensor
from jaxq.quantize import fake_quant


def conv_general_dilated(
    x: jax.Array, w: QTensor, **params: Any
) -> tuple[jax.Array, Choice]:
    """Return ``lax.conv_general_dilated`` with the kernel dequantized first.

    Convolution kernels are small beside their activations, so this costs little; the
    activation is quantized and read back when the weight asks for it (one scale for
    all of it, or per sample: a token's row is no contiguous row here).
    """
    reason = "no fused convolution"
    if w.activation is not None:
        axes = tuple(
            i for i in range(x.ndim) if i != params["dimension_numbers"].lhs_spec[0]
        )
        x = fake_quant(x, w.activation, axes)
        reason = "no fused convolution; activation quantized per sample and read back"
    y = lax.conv_general_dilated_p.bind(x, w.dequantize(), **params)
    return y, Choice("xla.dequantize_conv", (("fused", reason),))
