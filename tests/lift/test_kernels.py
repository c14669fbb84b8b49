"""Kernels of another chip, interpreted: chosen, run, and never given a sliced copy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core as jexc

import jaxq
from jaxq import QuantSpec
from pallas_kernels.target import Target

V5E = Target("tpu", "v5e", interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
STACK = (3, 256, 256)


@pytest.fixture(scope="module")
def stack():
    """Three layers of int4 weights, relaid, and what they stand for."""
    w = np.random.default_rng(3).standard_normal(STACK).astype(np.float32) / 16
    q = jaxq.quantize(jnp.asarray(w), QuantSpec("int4", 128), stacked=(0,))
    return jaxq.relayout(q, "tpu")


def rows(n, inner=256):
    x = np.random.default_rng(n).standard_normal((n, inner))
    return jnp.asarray(x, jnp.bfloat16)


def scanned(w, x):
    def layer(x, w):
        return jnp.tanh(x @ w.astype(x.dtype)), None

    return jax.lax.scan(layer, x, w)[0]


def indexed(w, x):
    def layer(i, x):
        return jnp.tanh(x @ w[i].astype(x.dtype))

    return jax.lax.fori_loop(0, w.shape[0], layer, x)


def unrolled(w, x):
    for i in range(w.shape[0]):
        x = jnp.tanh(x @ w[i].astype(x.dtype))
    return x


FUNCTIONS = (scanned, indexed, unrolled)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a_stack_reaches_the_kernel_whole(fn, stack):
    """No equation makes an array as large as one layer's codes."""
    explained = jaxq.explain(fn, stack, rows(8), target=V5E)
    assert {row.choice.kernel for row in explained} == {"tpu.weight_only_decode"}
    jaxpr = jax.make_jaxpr(jaxq.quantized(fn, target=V5E))(stack, rows(8))
    assert not list(copies(jaxpr.jaxpr))


def copies(jaxpr):
    """Yield the equations outside kernels that make an int4 array."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            continue
        made = [v.aval for v in eqn.outvars]
        inner = list(jexc.jaxprs_in_params(eqn.params))
        for body in inner:
            yield from copies(body)
        if not inner and any(a.dtype == jnp.int4 and a.shape != STACK for a in made):
            yield eqn


def test_the_check_for_copies_sees_one(stack):
    planar = jaxq.relayout(stack, "planar")
    sliced = lambda w, x: jaxq.relayout(jax.tree.map(lambda a: a[1], planar), "tpu")
    assert list(copies(jax.make_jaxpr(sliced)(stack, rows(8)).jaxpr))


def test_values_are_those_of_plain_xla(stack):
    y = jaxq.quantized(scanned, target=V5E)(stack, rows(8))
    plain = jaxq.quantized(scanned)(stack, rows(8))
    exact = scanned(stack.dequantize(jnp.float32), rows(8).astype(jnp.float32))
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.03)
    np.testing.assert_allclose(plain.astype(np.float32), exact, atol=0.03)


def test_fallback_and_gradient_run_in_plain_xla(stack):
    one = jax.tree.map(lambda a: a[0], stack)
    fn = lambda w, x: x @ w.astype(x.dtype)
    explained = jaxq.explain(fn, jaxq.relayout(one, "planar"), rows(8), target=V5E)
    (row,) = explained
    assert row.choice.kernel == "xla.tiled_dot"
    reasons = dict(row.choice.declined)
    assert "'planar', not 'tpu'" in reasons["tpu.weight_only_decode"]
    assert not explained.fallbacks
    x = rows(8).astype(jnp.float32)
    loss = lambda x, run: jnp.sum(run(one, x) ** 2)
    kernel, plain = jaxq.quantized(fn, target=V5E), jaxq.quantized(fn)
    grad = jax.grad(functools.partial(loss, run=kernel))(x)
    other = jax.grad(functools.partial(loss, run=plain))(x)
    np.testing.assert_allclose(grad, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("weight", "activation", "kernel", "most"),
    [
        (QuantSpec("int8"), QuantSpec("int8", "token"), "tpu.quantized_activation",
         1e-2),
        (QuantSpec("fp4_bnb", 64), None, "tpu.weight_only_decode", 4e-3),
        (QuantSpec("nf4", 64), None, "tpu.weight_only_decode", 2e-2),
        (QuantSpec("uint3", 128, symmetric=False), None,
         "tpu.weight_only_decode", 4e-3),
        (QuantSpec("uint4", 64, symmetric=False, scale=QuantSpec("uint8", 256)), None,
         "tpu.weight_only_decode", 4e-3),
    ],
    ids=str,
)  # fmt: skip
def test_formats_reach_their_kernel(weight, activation, kernel, most, rng):
    w = jnp.asarray(rng.standard_normal((300, 130)), jnp.float32)
    q = dataclasses.replace(jaxq.quantize(w, weight), activation=activation)
    q = jaxq.relayout_params({"w": q}, V5E)["w"]
    x = rows(5, 300)
    fn = lambda w, x: x @ w.astype(x.dtype)
    (row,) = jaxq.explain(fn, q, x, target=V5E)
    assert row.choice.kernel == kernel
    y = np.asarray(jaxq.quantized(fn, target=V5E)(q, x), np.float32)
    exact = np.asarray(x, np.float32) @ np.asarray(q.dequantize(jnp.float32))
    assert np.linalg.norm(y - exact) <= most * np.linalg.norm(exact)
