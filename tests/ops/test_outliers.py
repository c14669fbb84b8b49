"""LLM.int8(): outlier columns in floats, the rest in integers, in the right order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import ops
from jaxq.lift import explain
from jaxq.ops.activation import split_outliers
from jaxq.ops.outliers import FEW_COLUMNS, decoded_rows
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests import oracle

MATMUL = (((1,), (0,)), ((), ()))
KEPT = QuantSpec("int8", "token", outliers=6.0)
K, N = 96, 24


@functools.partial(jax.jit, static_argnums=1)
def quantized(w, spec):
    return quantize(w, spec, 0)


def weight(rng, spec, activation=KEPT, shape=(K, N)):
    q = quantized(rng.standard_normal(shape).astype(np.float32), spec)
    return dataclasses.replace(q, activation=activation)


def activation(rng, rows, outliers):
    """Normal, with some columns that hold outliers among small numbers."""
    x = rng.standard_normal((rows, K)).clip(-5, 5).astype(np.float32)
    for column in rng.choice(K, outliers, replace=False):
        x[rng.integers(rows), column] = rng.choice([-1, 1]) * rng.uniform(6, 60)
    return x


@jax.jit
def multiply(x, q):
    return ops.dot_general(x, q, MATMUL)[0]


def kernel_of(x, q):
    found = []
    jax.eval_shape(lambda x, q: found.append(ops.dot_general(x, q, MATMUL)[1]), x, q)
    return found[0].kernel


def official(x, threshold=6.0):
    """bitsandbytes: codes and scales of rows without outlier elements; the columns."""
    size = np.abs(x)
    outlier = size >= threshold
    scale = np.where(outlier, 0, size).max(1, keepdims=True) / np.float32(127)
    codes = np.where(outlier, 0, np.rint(x / np.where(scale == 0, 1, scale)))
    columns = outlier.any(0)
    codes[:, columns] = 0
    return codes, scale, columns


def mixed(x, q):
    """The product in exact integers and float64, and the size of its terms."""
    codes, scale, columns = official(x)
    w = oracle.dequantize(q)
    read = np.where(columns, x, codes * scale).astype(np.float64)
    return read @ w, np.abs(read) @ np.abs(w)


# --------------------------------------------------------------------- decomposition


def test_the_official_order(rng):
    """What is small in an outlier column counts in the scale, and then is zeroed."""
    x = activation(rng, 20, 3)
    codes, scale, columns = official(x)
    held = np.flatnonzero(columns)[0]
    row = int(np.argmin(np.abs(x[:, held])))
    x[row, held] = 5.5
    codes, scale, columns = official(x)
    assert scale[row, 0] == np.float32(5.5) / np.float32(127)
    q = weight(rng, QuantSpec("int8"))
    part, found = jax.jit(lambda x, q: split_outliers(x, q, KEPT))(x, q)
    np.testing.assert_array_equal(found[0], columns)
    np.testing.assert_array_equal(part.scale_values(), scale)
    np.testing.assert_array_equal(part.code_values(), codes)
    assert columns.sum() == 3
    assert not np.asarray(part.code_values())[:, columns].any()


def test_the_threshold_itself_is_an_outlier(rng):
    x = np.full((3, K), 1.0, np.float32)
    x[0, 7], x[2, 9], x[1, 11] = 6.0, -6.0, np.nextafter(np.float32(6), np.float32(0))
    _, columns = split_outliers(jnp.asarray(x), weight(rng, QuantSpec("int8")), KEPT)
    np.testing.assert_array_equal(np.flatnonzero(columns), [7, 9])


def test_a_tensor_by_itself_has_no_outliers():
    with pytest.raises(ValueError, match="outliers=6 is about the activation of a pro"):
        quantize(jnp.ones((4, 4)), KEPT)
    with pytest.raises(ValueError, match="has no threshold"):
        split_outliers(jnp.ones((4, 4)), None, QuantSpec("int8", "token"))


# -------------------------------------------------------------------------- products

WEIGHTS = [
    QuantSpec("int8"),
    QuantSpec("int8", 24),
    QuantSpec("uint4", 32, symmetric=False),
    QuantSpec("int3", 48),
    QuantSpec("int4", (32, 8), scale="bfloat16"),
]


@pytest.mark.parametrize("spec", WEIGHTS, ids=QuantSpec.describe)
@pytest.mark.parametrize("outliers", [0, 5, FEW_COLUMNS + 8])
def test_outlier_columns_meet_floats_and_the_others_integers(spec, outliers, rng):
    q = weight(rng, spec)
    sizes = (20, 300) if spec == QuantSpec("int8") else (20,)
    for rows in sizes:
        x = activation(rng, rows, outliers)
        assert kernel_of(x, q) == "xla.mixed_int8_dot"
        want, size = mixed(x, q)
        error = np.abs(np.asarray(multiply(x, q)) - want)
        assert np.all(error <= 2e-6 * size)


@pytest.mark.parametrize("outliers", [32, 33, 64, 65])
def test_up_to_an_eighth_of_the_columns_are_gathered(outliers, rng):
    q = weight(rng, QuantSpec("int8"), shape=(512, N))
    x = rng.standard_normal((20, 512)).clip(-5, 5).astype(np.float32)
    x[3, rng.choice(512, outliers, replace=False)] = 20
    want, size = mixed(x, q)
    assert np.all(np.abs(np.asarray(multiply(x, q)) - want) <= 2e-6 * size)


def test_every_column_may_hold_an_outlier(rng):
    q = weight(rng, QuantSpec("int8"))
    x = activation(rng, 20, K)
    want = x.astype(np.float64) @ oracle.dequantize(q)
    np.testing.assert_allclose(multiply(x, q), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_are_read_back(rows, rng):
    q = weight(rng, QuantSpec("int8"))
    x = activation(rng, rows, 2)
    assert kernel_of(x, q) == "xla.fused_dot"
    want, size = mixed(x, q)
    assert np.all(np.abs(np.asarray(multiply(x, q)) - want) <= 2e-6 * size)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (QuantSpec("nf4", 32), "xla.tiled_dot"),
        (QuantSpec("int8", center=True), "xla.dequantize_dot"),
    ],
)
def test_what_has_no_integer_kernel_computes_the_same(spec, name, rng):
    q = weight(rng, spec)
    x = activation(rng, 20, 5)
    assert kernel_of(x, q) == name
    want, size = mixed(x, q)
    assert np.all(np.abs(np.asarray(multiply(x, q)) - want) <= 3e-6 * size)


def test_the_float_part_has_the_dtype_of_the_activation(rng):
    """bfloat16 outliers meet dequantized int8 weights in bfloat16."""
    q = dataclasses.replace(weight(rng, QuantSpec("int8")), dtype=jnp.dtype("bfloat16"))
    x = jnp.asarray(activation(rng, 20, 5)).astype(jnp.bfloat16)
    wide = np.asarray(x.astype(jnp.float32))
    want, size = mixed(wide, q)
    y = multiply(x, q)
    assert np.all(np.abs(np.asarray(y, np.float32) - want) <= 2**-7 * size)
    columns = official(wide)[2]
    jaxpr = str(jax.make_jaxpr(lambda x, q: ops.dot_general(x, q, MATMUL)[0])(x, q))
    assert f"bf16[{FEW_COLUMNS},{N}]" in jaxpr
    assert 0 < columns.sum() <= 5


def test_a_stack_of_weights(rng):
    w = rng.standard_normal((3, K, N)).astype(np.float32)
    q = jax.jit(lambda w: quantize(w, QuantSpec("int8"), 1, stacked=(0,)))(w)
    q = dataclasses.replace(q, activation=KEPT)
    x = np.stack([activation(rng, 20, n) for n in (0, 3, 50)])
    numbers = (((2,), (1,)), ((0,), (0,)))
    got = jax.jit(lambda x, q: ops.dot_general(x, q, numbers)[0])(x, q)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], q)
        want, size = mixed(x[i], one)
        assert np.all(np.abs(np.asarray(got[i]) - want) <= 2e-6 * size)


def test_an_input_scale_comes_first(rng):
    """Smoothing takes the outliers away before they are looked for."""
    q = weight(rng, QuantSpec("int8"))
    x = activation(rng, 20, 5)
    scale = np.where(official(x)[2], 0.05, 1).astype(np.float32)[:, None]
    smooth = dataclasses.replace(q, input_scale=jnp.asarray(scale))
    met = x * scale[:, 0]
    assert not official(met)[2].any()
    want, size = mixed(met, q)
    got = np.asarray(multiply(x, smooth))
    assert np.all(np.abs(got - want) <= 2e-6 * size)


def test_gradients_pass_straight_through(rng):
    q = weight(rng, QuantSpec("int8"))
    x = activation(rng, 20, 5)
    cotangent = rng.standard_normal((20, N)).astype(np.float32)
    got = jax.jit(jax.grad(lambda x: jnp.sum(multiply(x, q) * cotangent)))(x)
    want = cotangent @ np.asarray(q.dequantize()).T
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_explain_shows_the_kernel(rng):
    q = weight(rng, QuantSpec("int8"))
    x = activation(rng, 20, 1)
    row = explain(lambda w, x: x @ w, q, x).rows[0]
    assert row.choice.kernel == "xla.mixed_int8_dot"
    plain = dataclasses.replace(q, activation=QuantSpec("int8", "token"))
    reasons = dict(explain(lambda w, x: x @ w, plain, x).rows[0].choice.declined)
    assert "keeps no outliers in float" in reasons["xla.mixed_int8_dot"]


@pytest.mark.parametrize("spec", WEIGHTS, ids=QuantSpec.describe)
def test_decoded_rows(spec, rng):
    q = weight(rng, spec)
    at = np.asarray([0, 95, 17, 17, 40])
    want = oracle.dequantize(q)[at].astype(np.float32)
    np.testing.assert_array_equal(decoded_rows(q, jnp.asarray(at)), want)


# --------------------------------------------------------------------------- the gain


def test_six_outlier_dimensions_of_512(rng):
    """±60 in 6 of 512 columns: the relative error of the product falls from about
    0.028 to 0.0075, that of the part without outliers from 0.138 to 0.0104."""
    x = rng.standard_normal((128, 512)).astype(np.float32)
    columns = rng.choice(512, 6, replace=False)
    x[:, columns] = 60 * rng.choice([-1, 1], (128, 6))
    w = rng.standard_normal((512, 64)).astype(np.float32)
    q = quantized(w, QuantSpec("int8"))
    usual = np.setdiff1d(np.arange(512), columns)
    want = x.astype(np.float64) @ w
    rest = x[:, usual].astype(np.float64) @ w[usual]

    def read(x):
        scale = np.abs(x).max(1, keepdims=True) / 127
        return np.rint(x / scale) * scale

    def errors(outliers):
        spec = QuantSpec("int8", "token", outliers=outliers)
        y = np.asarray(multiply(x, dataclasses.replace(q, activation=spec)), "f8")
        whole = np.linalg.norm(y - want) / np.linalg.norm(want)
        # less what the outliers contribute
        met = (read(x) if outliers is None else x)[:, columns].astype(np.float64)
        y = y - met @ oracle.dequantize(q)[columns]
        return whole, np.linalg.norm(y - rest) / np.linalg.norm(rest)

    plain, kept = errors(None), errors(6.0)
    assert 0.018 < plain[0] < 0.03
    np.testing.assert_allclose(plain[1], 0.138, rtol=0.05)
    np.testing.assert_allclose(kept[0], 0.0075, rtol=0.1)
    np.testing.assert_allclose(kept[1], 0.0104, rtol=0.1)
