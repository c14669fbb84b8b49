"""GPU kernels as `jaxq.quantized` reaches them: relaid weights, a scan, the choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec
from pallas_kernels.target import Target
from tests import private_jax

HOPPER = Target("gpu", "sm_90", interpret=private_jax.gpu_interpreter())
AMPERE = Target("gpu", "sm_80", interpret=True)
INT8 = QuantSpec("int8", "token")


def weight(rng, spec, shape=(512, 64), **options):
    w = rng.standard_normal(shape).astype(np.float32) / 16
    return jaxq.quantize(jnp.asarray(w), spec, **options)


def rows(rng, n, inner):
    return jnp.asarray(rng.standard_normal((n, inner)), jnp.bfloat16)


def product(w, x):
    return x @ w.astype(x.dtype)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", 32),
        QuantSpec("uint3", 128, symmetric=False),
        QuantSpec("nf4", 64),
    ],
    ids=lambda spec: spec.describe(),
)
def test_relayout_there_and_back_is_the_same_tensor(rng, spec):
    q = weight(rng, spec)
    moved = jaxq.relayout(q, "gpu")
    assert (moved.layout, moved.shape, moved.nbytes) == ("gpu", q.shape, q.nbytes)
    np.testing.assert_array_equal(moved.dequantize(), q.dequantize())
    back = jaxq.relayout(moved, "planar")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        (QuantSpec("int4", 32), 96),
        (QuantSpec("uint3", 64, symmetric=False), 200),
        (QuantSpec("int8", 64), 100),
        (QuantSpec("nf4", "channel"), 56),
        (QuantSpec("dynamic8", 64), 200),
    ],
    ids=str,
)
def test_rows_that_do_not_fill_blocks_are_filled_up(rng, spec, rows):
    q = weight(rng, spec, (rows, 64))
    moved = jaxq.relayout(q, "gpu")
    assert moved.shape == q.shape
    np.testing.assert_array_equal(moved.dequantize(), q.dequantize())
    back = jaxq.relayout(moved, "planar")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)
    x = jnp.asarray(rng.standard_normal((3, rows)), jnp.bfloat16)
    (found,) = jaxq.explain(product, moved, x, target=AMPERE)
    assert found.choice.kernel == "gpu.triton_weight_only"
    y = jaxq.quantized(product, target=AMPERE)(moved, x)
    expected = np.asarray(x, np.float32) @ np.asarray(q.dequantize())
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_codes_of_no_number_are_refused(rng, format):
    q = weight(rng, QuantSpec(format), (64, 64))
    bad = dataclasses.replace(q, codes=q.codes.at[3, 5].set(0x7F), name="w")
    for move in (
        lambda: jaxq.relayout(bad, "gpu"),
        lambda: jaxq.relayout_params({"w": bad}, AMPERE),
    ):
        with pytest.raises(ValueError, match="w has 1 codes of NaN or infinity"):
            move()
    assert jaxq.relayout(bad, "tpu").layout == "tpu"  # which reads them as they are


@pytest.mark.parametrize(
    ("target", "n", "activation", "kernel"),
    [
        (HOPPER, 4, None, "gpu.weight_only"),
        (HOPPER, 65, None, "gpu.weight_only_prefill"),
        (HOPPER, 4, INT8, "gpu.quantized_activation"),
        (AMPERE, 4, None, "gpu.triton_weight_only"),
        (AMPERE, 4, INT8, "gpu.triton_quantized_activation"),
    ],
)
def test_who_takes_what(rng, target, n, activation, kernel):
    q = jaxq.relayout(weight(rng, QuantSpec("int4", 128)), "gpu")
    q = dataclasses.replace(q, activation=activation)
    (found,) = jaxq.explain(product, q, rows(rng, n, 512), target=target)
    assert found.choice.kernel == kernel


def test_large_tables_are_looked_up_on_hopper_too(rng):
    q = jaxq.relayout(weight(rng, QuantSpec("dynamic8", 64)), "gpu")
    (found,) = jaxq.explain(product, q, rows(rng, 4, 512), target=HOPPER)
    assert found.choice.kernel == "gpu.triton_weight_only"
    reasons = dict(found.choice.declined)
    assert "registers hold 16" in reasons["gpu.weight_only"]


def test_scan_over_relaid_layers_is_the_float_function(rng):
    spec = QuantSpec("uint4", 64, symmetric=False)
    q = weight(rng, spec, (2, 128, 128), stacked=(0,))
    x = rows(rng, 5, 128)

    def layers(w, x):
        step = lambda x, w: (jnp.tanh(product(w, x)), None)
        return jax.lax.scan(step, x, w)[0]

    relaid = jaxq.relayout(q, "gpu")
    explained = jaxq.explain(layers, relaid, x, target=HOPPER)
    assert {row.choice.kernel for row in explained} == {"gpu.weight_only"}
    y = jaxq.quantized(layers, target=HOPPER)(relaid, x)
    expected = layers(q.dequantize(), x.astype(jnp.float32))
    # tanh is rounded to bfloat16 twice
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2.0**-6)
