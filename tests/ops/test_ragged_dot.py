"""Mixtures of experts: every token with its own expert's weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import ops
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from jaxq.views import ViewError
from tests import oracle

SIZES = np.asarray([4, 0, 3, 6], np.int32)  # an expert without tokens


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(x, spec, axis=1):
    return quantize(x, spec, axis, stacked=(0,))


@jax.jit
def ragged(x, w, sizes):
    return ops.ragged_dot(x, w, sizes)[0]


def expected(x, w, sizes):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    weights = w if isinstance(w, np.ndarray) else oracle.dequantize(w)
    return np.stack([x[i].astype(np.float64) @ weights[e] for i, e in enumerate(owner)])


@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        (64, QuantSpec("int8")),
        (64, QuantSpec("uint4", 16, symmetric=False, scale="bfloat16")),
        (64, QuantSpec("int3", "tensor")),
        (50, QuantSpec("nf4", 16)),
        (64, QuantSpec("fp8_e4m3", (32, 8))),
        (64, QuantSpec("nf4", 16, scale=QuantSpec("dynamic8", 16, center=True))),
    ],
    ids=lambda v: v.describe() if isinstance(v, QuantSpec) else str(v),
)
def test_every_token_meets_its_expert(rows, spec, rng):
    w = quantized(rng.standard_normal((4, rows, 20)).astype("f4"), spec)
    x = rng.standard_normal((SIZES.sum(), rows)).astype(np.float32)
    got = ragged(x, w, SIZES)
    np.testing.assert_allclose(got, expected(x, w, SIZES), rtol=1e-4, atol=1e-4)


def test_quantized_activations(rng):
    w = quantized(rng.standard_normal((4, 32, 8)).astype("f4"), QuantSpec("int8"))
    w = dataclasses.replace(w, activation=QuantSpec("int8", "token"))
    x = rng.standard_normal((SIZES.sum(), 32)).astype(np.float32)
    read = quantize(jnp.asarray(x), QuantSpec("int8", "token")).dequantize()
    want = expected(np.asarray(read), w, SIZES)
    np.testing.assert_allclose(ragged(x, w, SIZES), want, rtol=1e-4, atol=1e-4)


def test_the_result_has_the_dtype_asked_for(rng):
    w = quantized(rng.standard_normal((4, 32, 8)).astype("f4"), QuantSpec("int8"))
    x = jnp.asarray(rng.standard_normal((13, 32)), jnp.float32)
    y, choice = ops.ragged_dot(x, w, SIZES, None, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert choice.kernel == "xla.tiled_ragged_dot (4 experts)"


def test_what_it_declines(rng):
    x = jnp.zeros((13, 16), jnp.float32)
    values = rng.standard_normal((4, 16, 16)).astype(np.float32)
    with pytest.raises(ViewError, match="not packed along the contracted axis"):
        ops.ragged_dot(x, quantized(values, QuantSpec("int8"), 2), SIZES)
    centered = quantized(values, QuantSpec("int8", center=True))
    with pytest.raises(ViewError, match="offset"):
        ops.ragged_dot(x, centered, SIZES)


@pytest.mark.parametrize("own", [True, False])
def test_input_scales(own, rng):
    w = quantized(rng.standard_normal((4, 32, 8)).astype("f4"), QuantSpec("int8"))
    scale = rng.uniform(0.2, 5, (4 if own else 1, 32, 1)).astype(np.float32)
    w = dataclasses.replace(w, input_scale=jnp.asarray(scale))
    x = rng.standard_normal((SIZES.sum(), 32)).astype(np.float32)
    want = expected(x, w, SIZES)
    np.testing.assert_allclose(ragged(x, w, SIZES), want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("block", ["tensor", "token"])
@pytest.mark.parametrize("own", [True, False])
def test_static_activation_scales(own, block, rng):
    """Calibrated for each expert, or for all of them."""
    w = quantized(rng.standard_normal((4, 32, 8)).astype("f4"), QuantSpec("int8"))
    scale = rng.uniform(0.5, 1, (4 if own else 1, 1, 1)).astype("f4") / np.float32(127)
    w = dataclasses.replace(
        w, activation=QuantSpec("int8", block), activation_scale=jnp.asarray(scale)
    )
    x = rng.standard_normal((SIZES.sum(), 32)).astype(np.float32)
    owner = np.repeat(np.arange(4), SIZES)
    of_token = np.broadcast_to(scale, (4, 1, 1))[owner, 0]
    read = np.clip(np.rint(x / of_token), -127, 127) * of_token
    want = expected(read, dataclasses.replace(w, activation=None), SIZES)
    np.testing.assert_allclose(ragged(x, w, SIZES), want, rtol=1e-4, atol=1e-4)
