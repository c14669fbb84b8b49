"""The activation side of every kernel: static and dynamic, per token and per tensor."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import ops
from jaxq.quantize import quantize
from jaxq.scales import affine
from jaxq.spec import QuantSpec
from jaxq.views import with_input_index
from tests import oracle

MATMUL = (((1,), (0,)), ((), ()))
K, N = 64, 12
ACTIVATIONS = [
    QuantSpec("int8", "token"),
    QuantSpec("int8", "tensor"),
    QuantSpec("int8", "token", symmetric=False),
    QuantSpec("uint8", "tensor", symmetric=False),
    QuantSpec("fp8_e4m3", "token"),
    QuantSpec("fp8_e5m2", "tensor"),
]
# the kernel that takes int8 activations of 20 rows, and the one that takes others
WEIGHTS = {
    "w8": (QuantSpec("int8"), "xla.integer_tiled_dot", "xla.tiled_dot"),
    "w4": (QuantSpec("uint4", 16, False), "xla.integer_tiled_dot", "xla.tiled_dot"),
    "fp8": (QuantSpec("fp8_e4m3"), "xla.tiled_dot", "xla.tiled_dot"),
    "centered": (QuantSpec("int8", center=True),) + ("xla.dequantize_dot",) * 2,
}
FLOATS = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


@functools.partial(jax.jit, static_argnums=1)
def quantized(w, spec):
    return quantize(w, spec, 0)


@functools.cache
def stored(name):
    w = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)
    return quantized(w, WEIGHTS[name][0])


@jax.jit
def multiply(inputs, q):
    return [ops.dot_general(x, q, MATMUL)[0] for x in inputs]


def kernel_of(x, q):
    found = []
    jax.eval_shape(lambda x, q: found.append(ops.dot_general(x, q, MATMUL)[1]), x, q)
    return found[0].kernel


def read_back(x, spec, bounds=None):
    """What a quantized activation stands for, in float64; clipped to ``bounds``."""
    x = x.astype(np.float64)
    axis = None if spec.block == "tensor" else 1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    if bounds is not None:
        low, high = (np.full((1, 1), b) for b in bounds)
    bits, signed = spec.bits, not spec.format.startswith("u")
    if not spec.symmetric:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        first = -(2 ** (bits - 1)) if signed else 0
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(first - low / scale)
        code = np.clip(np.rint(x / scale) + zero, first, first + 2**bits - 1)
        return (code - zero) * scale
    largest = np.maximum(np.abs(low), np.abs(high))
    if spec.format in FLOATS:
        top = float(ml_dtypes.finfo(FLOATS[spec.format]).max)
        scale = largest / top
        inside = np.clip(x / scale, -top, top).astype(np.float32)
        return inside.astype(FLOATS[spec.format]).astype(np.float64) * scale
    top = 2 ** (bits - 1) - 1
    scale = largest / top
    return np.clip(np.rint(x / scale), -top, top) * scale


def fallback(x, q, numbers):
    """The product where no kernel takes it."""
    found = []

    def run(x, q):
        y, choice = ops.dot_general(x, q, numbers)
        found.append(choice)
        return y

    y = jax.jit(run)(x, q)
    assert found[0].kernel == "dequantize"
    return y


def check(x, y, read, q, spec, scale=1.0):
    """Equal up to float32, but for the few numbers that lie on a rounding boundary."""
    w = oracle.dequantize(dataclasses.replace(q, input_scale=None))
    step = 2.0**-2 if spec.format in FLOATS else 1.0
    error = np.abs(np.asarray(y, np.float64) - read @ w)
    size = np.abs(read) @ np.abs(w)
    largest = np.abs(read).max() / (2 ** (spec.bits - 1) - 1) * np.abs(w).max()
    allowed = 3e-6 * size + 1e-6
    assert np.mean(error <= allowed) > 0.9
    assert np.all(error <= allowed + 2 * step * largest * scale)


def rows(rng):
    """One row, few and many: asymmetric on purpose."""
    return [(rng.standard_normal((n, K)) + 0.3).astype(np.float32) for n in (1, 20)]


@pytest.mark.parametrize("spec", ACTIVATIONS, ids=QuantSpec.describe)
@pytest.mark.parametrize("name", ["w8", "w4"])
def test_dynamic(name, spec, rng):
    q = dataclasses.replace(stored(name), activation=spec)
    inputs = rows(rng)
    takes_int8, others = WEIGHTS[name][1:]
    integers = spec.format == "int8" and spec.symmetric
    assert kernel_of(inputs[1], q) == (takes_int8 if integers else others)
    for x, y in zip(inputs, multiply(inputs, q), strict=True):
        check(x, y, read_back(x, spec), q, spec)


@pytest.mark.parametrize("spec", ACTIVATIONS, ids=QuantSpec.describe)
@pytest.mark.parametrize("name", WEIGHTS)
def test_static_and_clipped(name, spec, rng):
    """A calibrated range that cuts off the tails; on top an input scale."""
    low, high = (-1.0, 1.5) if not spec.symmetric else (-1.5, 1.5)
    bounds = jnp.full((1, 1), low, jnp.float32), jnp.full((1, 1), high, jnp.float32)
    scale, zero = affine(*bounds, spec)
    smooth = rng.uniform(0.5, 2, (K, 1)).astype(np.float32)
    q = dataclasses.replace(
        stored(name),
        activation=spec,
        activation_scale=scale,
        activation_zero=None if zero is None else zero.astype(jnp.int32),
        input_scale=jnp.asarray(smooth),
    )
    inputs = rows(rng)
    assert (np.abs(inputs[1] * smooth[:, 0]) > high).any()
    for x, y in zip(inputs, multiply(inputs, q), strict=True):
        read = read_back(x * smooth[:, 0], spec, (low, high))
        assert read.max() <= high * 1.001
        check(x, y, read, q, spec)


def test_a_stack_has_static_scales_of_its_own(rng):
    spec = QuantSpec("int8", "tensor")
    w = rng.standard_normal((3, K, N)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, QuantSpec("int8"), 1, stacked=(0,)))(w)
    limits = np.asarray([0.5, 1.0, 2.0], np.float32)
    scale = jnp.asarray(limits.reshape(3, 1, 1) / np.float32(127))
    q = dataclasses.replace(q, activation=spec, activation_scale=scale)
    x = rng.standard_normal((3, 20, K)).astype(np.float32)
    numbers = (((2,), (1,)), ((0,), (0,)))
    y = jax.jit(lambda x, q: ops.dot_general(x, q, numbers)[0])(x, q)
    for i, limit in enumerate(limits):
        one = jax.tree.map(lambda a, i=i: a[i], q)
        check(x[i], y[i], read_back(x[i], spec, (-limit, limit)), one, spec)


def test_a_zero_point_needs_an_asymmetric_activation():
    q = dataclasses.replace(
        stored("w8"),
        activation=QuantSpec("int8", "tensor"),
        activation_scale=jnp.ones((1, 1), jnp.float32),
        activation_zero=jnp.zeros((1, 1), jnp.int8),
    )
    with pytest.raises(ValueError, match="activation_zero=None, or ask for symmetric"):
        multiply([jnp.ones((20, K), jnp.float32)], q)


@pytest.mark.parametrize("static", [False, True])
def test_where_no_view_helps_the_activation_is_quantized_all_the_same(static, rng):
    """Packed along an axis that is not contracted here: dequantized, not forgotten."""
    w = rng.standard_normal((3, K, N)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, QuantSpec("int8", 4), 2, stacked=(0,)))(w)
    smooth = rng.uniform(0.2, 5, (3, K, 1)).astype(np.float32)
    limits = np.asarray([0.5, 1.0, 2.0], np.float32).reshape(3, 1, 1)
    spec = QuantSpec("int8", "tensor" if static else "token")
    q = dataclasses.replace(
        q,
        activation=spec,
        activation_scale=jnp.asarray(limits / np.float32(127)) if static else None,
        input_scale=jnp.asarray(smooth),
    )
    x = rng.standard_normal((K, 3, 20)).astype(np.float32)
    numbers = (((0,), (1,)), ((1,), (0,)))
    y = fallback(x, q, numbers)
    for i, limit in enumerate(limits.ravel()):
        one = jax.tree.map(lambda a, i=i: a[i], q)
        met = x[:, i].T * smooth[i, :, 0]
        read = read_back(met, spec, (-limit, limit) if static else None)
        check(met, y[i], read, one, spec)


def test_there_the_picked_axis_may_be_free(rng):
    w = rng.standard_normal((K, N)).astype(np.float32)
    q = with_input_index(quantized(w, QuantSpec("int8")), rng.permutation(K) // 2, 32)
    spec = QuantSpec("int8", "token")
    q = dataclasses.replace(q, activation=spec)
    x = rng.standard_normal((20, N)).astype(np.float32)
    y = fallback(x, q, (((1,), (1,)), ((), ())))
    want = read_back(x, spec) @ oracle.dequantize(q).T
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-2)


def test_there_too_channels_are_picked_before_the_rounding(rng):
    """Two contracted axes around a free one, one of them picked and scaled."""
    w = rng.standard_normal((2, 32, N)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, QuantSpec("int8"), 1, stacked=(0,)))(w)
    index = rng.permutation(32) // 2
    smooth = rng.uniform(0.2, 5, (1, 32, 1)).astype(np.float32)
    spec = QuantSpec("int8", "token")
    q = dataclasses.replace(
        with_input_index(q, index, 16), activation=spec, input_scale=jnp.asarray(smooth)
    )
    x = rng.standard_normal((20, 2, 16)).astype(np.float32)
    y = fallback(x, q, (((1, 2), (0, 1)), ((), ())))
    met = (x[:, :, index] * smooth[:, :, 0]).reshape(20, 64)
    plain = dataclasses.replace(q, input_index=None, rows=None, input_scale=None)
    want = read_back(met, spec) @ oracle.dequantize(plain).reshape(64, N)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-2)


# ------------------------------------------------- blocks with small scales: nvfp4, mx

FP8 = ml_dtypes.float8_e4m3fn
E2M1 = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NVFP4 = QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor"))
DIVIDED = dataclasses.replace(
    NVFP4, scale=QuantSpec("fp8_e4m3", "tensor", scale="inverse_float32")
)
BLOCKED = [
    NVFP4,
    QuantSpec("fp4_e2m1", 16, scale="e4m3"),
    QuantSpec("fp4_e2m1", 32, scale="e8m0"),
    QuantSpec("fp4_e2m1", 32, scale="e8m0", exponent="near"),
    QuantSpec("fp8_e4m3", 32, scale="e8m0", exponent="near"),
    QuantSpec("fp8_e4m3", 32, scale="e8m0", exponent="ceil"),
]


def nearest(x, spec):
    """The nearest number of the format, in float64; ties to the even code."""
    if spec.format == "fp8_e4m3":
        return np.clip(x, -448, 448).astype(FP8).astype(np.float64)
    distance = np.abs(np.abs(x)[..., None] - E2M1)
    codes = np.arange(8)
    return np.sign(x) * E2M1[np.argmin(distance + 1e-9 * (codes % 2), -1)]


def blocks_read_back(x, spec, world=None):
    """What blocks stand for: `world` multiplies their fp8 scales."""
    blocks = x.astype(np.float64).reshape(len(x), -1, spec.block)
    top = 448.0 if spec.format == "fp8_e4m3" else 6.0
    largest = np.abs(blocks).max(-1, keepdims=True)
    if spec.scale == "e8m0":
        mantissa, exponent = np.frexp(largest)
        up = {"floor": 2, "near": 1.75, "ceil": 1.5 if top == 6 else 1.75 + 1e-9}
        up = 2 * mantissa >= up[spec.exponent]
        scale = 2.0 ** (exponent - 1 + up - np.floor(np.log2(top)))
    else:
        ideal = largest / top
        if isinstance(spec.scale, QuantSpec):
            world = ideal.max() / 448 if world is None else world
        else:
            world = 1.0
        scale = np.minimum(ideal / world, 448).astype(FP8).astype(np.float64) * world
    codes = nearest(blocks / np.where(scale == 0, 1, scale), spec)
    return (codes * scale).reshape(x.shape)


def uneven(rng, n):
    """Rows whose blocks differ in size by far, one of them all zeros."""
    x = rng.standard_normal((n, K)) * 2.0 ** rng.integers(
        -6, 3, (n, K // 16, 1)
    ).repeat(16, 1).reshape(n, K)
    x[0, :16] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("spec", BLOCKED, ids=QuantSpec.describe)
@pytest.mark.parametrize("name", ["w4", "fp8"])
def test_blocks_of_fp4_and_fp8(name, spec, rng):
    q = dataclasses.replace(stored(name), activation=spec)
    inputs = [uneven(rng, n) for n in (1, 20)]
    assert kernel_of(inputs[1], q) == "xla.tiled_dot"
    for x, y in zip(inputs, multiply(inputs, q), strict=True):
        read = blocks_read_back(x, spec)
        assert np.abs(read - x).max() > 0.01  # it is no small change
        check_closely(y, read, q)


@pytest.mark.parametrize("spec", [NVFP4, DIVIDED], ids=["multiplied", "divided"])
def test_a_static_scale_of_scales(spec, rng):
    """Too small for some blocks, whose scales saturate; too large for the smallest."""
    x = uneven(rng, 20)
    world = np.float32(np.abs(x).max() / 6 / 448 / 2)
    stored_world = 1 / world if spec is DIVIDED else world
    q = dataclasses.replace(
        stored("fp8"),
        activation=spec,
        activation_scale=jnp.full((1, 1), stored_world, jnp.float32),
    )
    read = blocks_read_back(x, spec, float(world))
    assert np.abs(read).max() < np.abs(x).max() / 1.5
    check_closely(multiply([x], q)[0], read, q)


def check_closely(y, read, q):
    """Equal up to float32: no number of the data lies on a rounding boundary."""
    w = oracle.dequantize(q)
    error = np.abs(np.asarray(y, np.float64) - read @ w)
    assert np.all(error <= 3e-6 * (np.abs(read) @ np.abs(w)) + 1e-6)


def test_experts_have_static_scales_of_scales_of_their_own(rng):
    """A batch of matrices, and tokens that are sorted by their expert."""
    w = rng.standard_normal((3, K, N)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, QuantSpec("int8"), 1, stacked=(0,)))(w)
    worlds = np.asarray([1e-3, 4e-4, 2e-4], np.float32)
    q = dataclasses.replace(
        q, activation=NVFP4, activation_scale=jnp.asarray(worlds.reshape(3, 1, 1))
    )
    x = rng.standard_normal((3, 20, K)).astype(np.float32)
    numbers = (((2,), (1,)), ((0,), (0,)))
    batched = jax.jit(lambda x, q: ops.dot_general(x, q, numbers)[0])(x, q)
    counts = jnp.full(3, 20, jnp.int32)
    ragged = jax.jit(lambda x, q: ops.ragged_dot(x, q, counts)[0])(x.reshape(60, K), q)
    for i, world in enumerate(worlds):
        one = jax.tree.map(lambda a, i=i: a[i], q)
        read = blocks_read_back(x[i], NVFP4, float(world))
        check_closely(batched[i], read, one)
        check_closely(ragged[20 * i : 20 * (i + 1)], read, one)


def test_explain_says_that_blocks_are_read_back():
    q = dataclasses.replace(stored("fp8"), activation=NVFP4)
    reasons = jaxq.explain(lambda w, x: x @ w, q, jnp.ones((20, K))).rows[0].choice
    assert reasons is not None
    said = dict(reasons.declined)["xla.integer_tiled_dot"]
    assert said.startswith("the activation is fp4_e2m1 g16, scales as fp8_e4m3 tensor")
    assert said.endswith("it is rounded and multiplied as floats")
