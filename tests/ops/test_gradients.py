"""Gradients of products: those of the dequantized function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import ops
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec

MATMUL = (((1,), (0,)), ((), ()))
SPECS = {
    "w8": QuantSpec("int8"),
    "w4": QuantSpec("uint4", 32, symmetric=False),
    "w3": QuantSpec("int3", 16),
    "nf4": QuantSpec("nf4", 16),
    "fp8": QuantSpec("fp8_e4m3", (32, 8)),
}


INNER = 1056  # three tiles


def problem(spec, rng, activation=None):
    w = rng.standard_normal((INNER, 10)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, spec))(w)
    factor = jnp.asarray(rng.uniform(0.5, 2, (INNER, 1)), jnp.float32)
    return dataclasses.replace(q, input_scale=factor, activation=activation)


def gradients(dot, x, q, cotangent):
    def loss(x, q):
        return jnp.sum(dot(x, q) * cotangent)

    return jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, q)


def fused(x, q):
    return ops.dot_general(x, q, MATMUL)[0]


def floats(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in leaves
        if leaf.dtype != jax.dtypes.float0
    ]


@pytest.mark.parametrize(("name", "rows"), [("w4", 1), *((n, 20) for n in SPECS)])
def test_weight_only(name, rows, rng):
    q = problem(SPECS[name], rng)
    x = rng.standard_normal((rows, INNER)).astype(np.float32)
    cotangent = rng.standard_normal((rows, 10)).astype(np.float32)
    got = gradients(fused, x, q, cotangent)
    want = gradients(lambda x, q: x @ q.dequantize(), x, q, cotangent)
    found = floats(got)
    assert {path for path, _ in found} >= {"[0]", "[1].scales", "[1].input_scale"}
    for (path, a), (_, b) in zip(found, floats(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=path)
    integers = [leaf for leaf in jax.tree.leaves(got[1]) if leaf.dtype == "V"]
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in integers)


@pytest.mark.parametrize(
    ("name", "rows"), [("w8", 1), ("w8", 5), ("w8", 300), ("w4", 5), ("nf4", 5)]
)
def test_quantized_activations_pass_gradients_straight_through(name, rows, rng):
    """The activation's rounding counts as the identity (Bengio et al. 2013)."""
    spec = QuantSpec("int4", 32) if name == "w4" else SPECS[name]
    q = problem(spec, rng, QuantSpec("int8", "token"))
    x = rng.standard_normal((rows, INNER)).astype(np.float32)
    cotangent = rng.standard_normal((rows, 10)).astype(np.float32)
    got, _ = gradients(fused, x, q, cotangent)
    want, _ = gradients(lambda x, q: x @ q.dequantize(), x, q, cotangent)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_of_a_batched_product(rng):
    spec = QuantSpec("uint4", 16, symmetric=False)
    w = rng.standard_normal((3, 32, 6)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, spec, 1, stacked=(0,)))(w)
    x = rng.standard_normal((3, 2, 32)).astype(np.float32)
    numbers = (((2,), (1,)), ((0,), (0,)))
    cotangent = rng.standard_normal((3, 2, 6)).astype(np.float32)
    got = gradients(lambda x, q: ops.dot_general(x, q, numbers)[0], x, q, cotangent)
    want = gradients(lambda x, q: jnp.matmul(x, q.dequantize()), x, q, cotangent)
    for (path, a), (_, b) in zip(floats(got), floats(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=path)


def test_forward_mode(rng):
    q = problem(SPECS["w4"], rng)
    x, dx = (
        jnp.asarray(rng.standard_normal((3, INNER)), jnp.float32) for _ in range(2)
    )
    y, dy = jax.jvp(lambda x: fused(x, q), (x,), (dx,))
    want = jax.jvp(lambda x: x @ q.dequantize(), (x,), (dx,))
    np.testing.assert_allclose(y, want[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dy, want[1], rtol=1e-3, atol=1e-3)
