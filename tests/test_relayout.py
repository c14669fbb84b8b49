"""Layouts of the codes: reversible, the same numbers, and never what is saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec
from jaxq.codecs.unpacked import Unpacked
from jaxq.quantize import quantize
from pallas_kernels.target import Target

V5E = Target("tpu", "v5e")


def weight(spec, shape=(2, 72, 24)):
    w = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    stacked = tuple(range(len(shape) - 2))
    return jax.jit(lambda w: quantize(w, spec, stacked=stacked))(w)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("int4", 32), QuantSpec("uint3", symmetric=False), QuantSpec("int8", 64)],
    ids=str,
)
def test_relayout_there_and_back_is_the_same_tensor(spec):
    q = weight(spec)
    moved = jax.jit(lambda q: jaxq.relayout(q, "tpu"))(q)
    assert moved.layout == "tpu"
    assert moved.shape == q.shape
    np.testing.assert_array_equal(moved.dequantize(), q.dequantize())
    back = jaxq.relayout(moved, "planar")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_views_of_relaid_codes(rng):
    q = jaxq.relayout(weight(QuantSpec("int4", 32), (64, 24)), "tpu")
    w, x = q.dequantize(), jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    fns = [
        lambda w: x @ w.T,
        lambda w: w[:32].T,
        lambda w: w.reshape(64, 4, 6)[..., 0],
        lambda w: jnp.take(w, jnp.asarray([3, 1]), axis=0),
    ]
    for fn in fns:
        np.testing.assert_allclose(jaxq.quantized(fn)(q), fn(w), rtol=1e-5, atol=1e-5)


def test_saved_files_hold_the_canonical_layout(tmp_path):
    q = weight(QuantSpec("int4", 32))
    jaxq.save(tmp_path / "saved", {"w": jaxq.relayout(q, "tpu")})
    back = jaxq.load(tmp_path / "saved")["w"]
    assert back.layout == "planar"
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_other_libraries_get_the_same_codes_from_any_layout():
    q = weight(QuantSpec("uint4", 32, symmetric=False), (64, 24))
    plain, relaid = Unpacked.of(q), Unpacked.of(jaxq.relayout(q, "tpu"))
    np.testing.assert_array_equal(relaid.codes, plain.codes)
    np.testing.assert_array_equal(relaid.codes, q.code_values())


def test_parameters_that_have_no_layout_stay():
    across = weight(QuantSpec("int4", 8), (16, 64))
    across = quantize(across.dequantize(), QuantSpec("int4", 8), axis=1)
    table = weight(QuantSpec("dynamic8", 64), (64, 24))
    params = {"rows": across, "table": table, "w": weight(QuantSpec("int8"), (64, 24))}
    moved = jaxq.relayout_params(params | {"b": jnp.ones(3)}, V5E)
    assert [moved[k].layout for k in params] == ["planar", "planar", "tpu"]
    assert moved["w"].nbytes == params["w"].nbytes
    assert jaxq.relayout_params(params, Target("cpu")) is params
    with pytest.raises(ValueError, match="packs axis -1 of 2"):
        jaxq.relayout(across, "tpu")
    with pytest.raises(ValueError, match="no layout 'cpu'"):
        jaxq.relayout(dataclasses.replace(params["w"]), "cpu")
