"""int8 activations: exact integer sums, one rounding per scale."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import ops
from jaxq.formats import FORMATS
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests import oracle

MATMUL = (((1,), (0,)), ((), ()))
TOKEN = QuantSpec("int8", "token")
WHOLE_SUMS = ("xla.int8_dot", "xla.integer_tiled_dot")


def weight(values, spec, activation=TOKEN, scale=None):
    q = jax.jit(lambda x: quantize(x, spec))(values)
    if scale is not None:
        scale = jnp.full((1, 1), scale, jnp.float32)
    return dataclasses.replace(q, activation=activation, activation_scale=scale)


@jax.jit
def products(inputs, q):
    return [ops.dot_general(x, q, MATMUL)[0] for x in inputs]


def inputs(rng, q):
    """As many rows as there are kernels for."""
    sizes = (1, 5, 300) if q.spec.format == "int8" else (1, 5)
    return [rng.standard_normal((n, q.shape[0])).astype(np.float32) for n in sizes]


def numpy_activation(x, spec, static):
    """Codes less zero points (int64) and scales of the activation."""
    axes = None if spec.block == "tensor" else 1
    if static is not None:
        scale = np.full((1, 1), np.float32(static))
    elif spec.symmetric:
        largest = np.abs(x).max(axes, keepdims=True)
        scale = (largest / np.float32(127)).astype(np.float32)
    else:
        low = np.minimum(x.min(axes, keepdims=True), 0)
        high = np.maximum(x.max(axes, keepdims=True), 0)
        scale = ((high - low) / np.float32(255)).astype(np.float32)
        zero = np.rint(-128 - low / scale)
        code = np.clip(np.rint(x / scale) + zero, -128, 127)
        return (code - zero).astype(np.int64), scale
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int64), scale


def integer_oracle(x, q, static=None):
    """Σ over groups of scale · (integer product), in exact integers and float64."""
    codes, scale = numpy_activation(x, q.activation, static)
    bits = q.spec.bits
    w = oracle.unpack(np.asarray(q.codes), bits, 0, q.pack)[: q.shape[0]]
    table = np.asarray(FORMATS[q.spec.format].decode(np.arange(2**bits, dtype="u1")))
    w = table.astype(np.int64)[w]
    if q.zeros is not None:
        w = w - oracle.spread(np.asarray(q.zeros, np.int64), q.blocks, q.shape)
    scales = oracle.spread(oracle.scale_values(q), q.blocks, q.shape)
    out, size = 0.0, 0.0
    for start in range(0, q.shape[0], q.blocks[0]):
        part = slice(start, start + q.blocks[0])
        out = out + (codes[:, part] @ w[part]) * scales[start]
        size = size + np.abs(codes[:, part]) @ np.abs(w[part]) * scales[start]
    return out * scale, np.abs(size * scale)


def kernel_of(x, q):
    """The kernel that takes the product, without running it."""
    choices = []
    jax.eval_shape(lambda x, q: choices.append(ops.dot_general(x, q, MATMUL)[1]), x, q)
    return choices[0].kernel


def check(values, spec, activation=TOKEN, static=None, rng=None):
    q = weight(values, spec, activation, static)
    rows = inputs(rng, q)
    for x, y in zip(rows, products(rows, q), strict=True):
        want, size = integer_oracle(x, q, static)
        # With one scale per column the sum is exact and three roundings follow;
        # otherwise groups, or a few products at a time, are added in float32.
        whole = q.blocks[0] >= q.shape[0] and kernel_of(x, q) in WHOLE_SUMS
        tolerance = 4e-7 * np.abs(want) if whole else 2e-6 * size
        assert np.all(np.abs(np.asarray(y) - want) <= tolerance + 1e-30)
    return q


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8"),
        QuantSpec("int4"),
        QuantSpec("uint4", symmetric=False),
        QuantSpec("int3"),
        QuantSpec("uint7", symmetric=False),
        QuantSpec("int8", symmetric=False),
        QuantSpec("uint8", symmetric=False),
        QuantSpec("int8", "tensor"),
        QuantSpec("int4", 32),
        QuantSpec("int8", 24),
        QuantSpec("uint4", 48, symmetric=False, scale="bfloat16"),
        QuantSpec("uint3", 24, symmetric=False),
        QuantSpec("int8", (32, 8)),
    ],
    ids=QuantSpec.describe,
)
def test_products_are_exact_integer_sums(spec, rng):
    values = (rng.standard_normal((96, 40)) + 0.4).astype(np.float32)
    check(values, spec, rng=rng)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8"),
        QuantSpec("int4", 64),
        QuantSpec("uint3", 96, symmetric=False),
        QuantSpec("int8", 768),
        QuantSpec("int4", 200),
    ],
    ids=QuantSpec.describe,
)
def test_more_rows_than_a_tile(spec, rng):
    values = (rng.standard_normal((1536, 12)) + 0.2).astype(np.float32)
    check(values, spec, rng=rng)


@pytest.mark.parametrize("rows", [7, 50, 130])
def test_padded_rows_add_nothing(rows, rng):
    values = (rng.standard_normal((rows, 10)) + 1).astype(np.float32)
    q = check(values, QuantSpec("uint4", symmetric=False), rng=rng)
    assert q.padding > 0


@pytest.mark.parametrize(
    "activation",
    [
        QuantSpec("int8", "tensor"),
        QuantSpec("int8", "channel"),
        QuantSpec("int8", "token", symmetric=False),
    ],
    ids=QuantSpec.describe,
)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_other_activation_grids(activation, name, rng):
    values = rng.standard_normal((64, 10)).astype(np.float32)
    check(values, QuantSpec(name), activation, rng=rng)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("block", ["token", "tensor"])
def test_a_static_scale_saturates(name, block, rng):
    values = rng.standard_normal((64, 10)).astype(np.float32)
    static = 1.0 / 127  # numbers beyond 1 saturate
    check(values, QuantSpec(name), QuantSpec("int8", block), static, rng=rng)


def test_worst_case_sums_do_not_round():
    """4095 products of 127 · 127 less one: beyond float32's 24 bits, within int32."""
    values = np.full((4096, 8), 1.0, np.float32)
    values[0] = -1.0
    q = weight(values, QuantSpec("int8"), scale=1.0)
    x = np.full((20, 4096), 127.0, np.float32)
    x[:, 1] = 126.0
    y = jax.jit(lambda x, q: ops.dot_general(x, q, MATMUL)[0])(x, q)
    exact = 4094 * 127 + 126 - 127
    np.testing.assert_allclose(y, exact, rtol=2e-7)


@functools.partial(jax.jit, static_argnums=2)
def through_float(x, q, activation):
    read = quantize(x, activation, axis=-1).dequantize()
    return read @ q.dequantize()


@pytest.mark.parametrize("name", ["nf4", "fp8_e4m3"])
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
def test_what_has_no_integer_kernel_reads_back(name, activation, rng):
    activation = QuantSpec(activation, "token")
    q = weight(
        rng.standard_normal((64, 10)).astype("f4"), QuantSpec(name, 32), activation
    )
    rows = inputs(rng, q)
    for x, y in zip(rows, products(rows, q), strict=True):
        np.testing.assert_allclose(
            y, through_float(x, q, activation), rtol=1e-4, atol=1e-4
        )


def test_integer_kernels_take_what_they_should(rng):
    values = rng.standard_normal((64, 16)).astype(np.float32)
    x = rng.standard_normal((33, 64)).astype(np.float32)
    for spec in (QuantSpec("int8"), QuantSpec("int4"), QuantSpec("uint4", 32, False)):
        assert kernel_of(x, weight(values, spec)) in WHOLE_SUMS, spec
    for spec in (QuantSpec("nf4"), QuantSpec("uint8", 32, False)):
        assert kernel_of(x, weight(values, spec)) not in WHOLE_SUMS, spec
    centered = QuantSpec("int8", "token", center=True)
    for activation in (None, QuantSpec("fp8_e4m3", "token"), centered):
        q = weight(values, QuantSpec("int8"), activation)
        assert kernel_of(x, q) not in WHOLE_SUMS, activation
