"""Convolutions with a quantized kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq import ops
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec


def parameters(x, kernel):
    """What `lax.conv_general_dilated` binds for an NHWC convolution."""
    jaxpr = jax.make_jaxpr(
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )(x, kernel)
    return jaxpr.eqns[0].params


def numpy_conv(x, kernel):
    """Strides (1, 2), 3 × 3 with one pixel of padding (SAME, for odd widths)."""
    n, h, w, _ = x.shape
    x = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, h, (w + 1) // 2, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            part = x[:, i : i + h, j : j + w : 2]
            out += part @ kernel[i, j].astype(np.float64)
    return out


@pytest.fixture
def operands(rng):
    x = rng.standard_normal((2, 5, 7, 16)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 16, 6)).astype(np.float32)
    return x, kernel


@pytest.mark.parametrize(
    "spec", [QuantSpec("int8"), QuantSpec("uint4", 16, False)], ids=QuantSpec.describe
)
def test_the_kernel_is_read_back(spec, operands):
    x, kernel = operands
    q = jax.jit(lambda k: quantize(k, spec, (0, 1, 2)))(kernel)
    y, choice = ops.conv_general_dilated(jnp.asarray(x), q, **parameters(x, kernel))
    assert choice.kernel == "xla.dequantize_conv"
    np.testing.assert_allclose(
        y, numpy_conv(x, np.asarray(q.dequantize())), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("static", [None, 1 / 127])
def test_the_activation_is_quantized_too(static, operands):
    x, kernel = operands
    q = jax.jit(lambda k: quantize(k, QuantSpec("int8"), (0, 1, 2)))(kernel)
    if static is None:
        scale = np.abs(x).max((1, 2, 3), keepdims=True) / np.float32(127)
        stored = None
    else:
        scale = np.float32(static)
        stored = jnp.full((1, 1, 1, 1), static, jnp.float32)
    q = dataclasses.replace(
        q, activation=QuantSpec("int8", "token"), activation_scale=stored
    )
    y, choice = ops.conv_general_dilated(jnp.asarray(x), q, **parameters(x, kernel))
    read = np.clip(np.rint(x / scale), -127, 127) * scale
    want = numpy_conv(read, np.asarray(q.dequantize()))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    assert "activation quantized" in choice.declined[0][1]


def test_an_input_scale_comes_before_the_rounding(operands, rng):
    x, kernel = operands
    x[..., 3] *= 50
    scale = np.ones((1, 1, 16, 1), np.float32)
    scale[..., 3, :] = 1 / 50
    q = jax.jit(lambda k: quantize(k, QuantSpec("int8"), (0, 1, 2)))(kernel)
    q = dataclasses.replace(
        q, activation=QuantSpec("int8", "token"), input_scale=jnp.asarray(scale)
    )
    y, _ = ops.conv_general_dilated(jnp.asarray(x), q, **parameters(x, kernel))
    smooth = x * scale[0, 0, :, 0]
    step = np.abs(smooth).max((1, 2, 3), keepdims=True) / np.float32(127)
    plain = np.asarray(dataclasses.replace(q, input_scale=None).dequantize())
    want = numpy_conv(np.rint(smooth / step) * step, plain)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3)
