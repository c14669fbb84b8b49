"""The pass over the rows: GPTQ and coordinate descent, whatever the spans."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.quantize import quantize
from jaxq.solvers.feedback import Grid, Problem, Rounded, Sweep, spans
from jaxq.spec import QuantSpec
from tests import oracle
from tests.solvers import layers

K, N, GROUP = 24, 16, 8
SPEC = QuantSpec("uint3", GROUP, False)


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((K, N)).astype(np.float32)
    h = layers.damped(layers.statistics(layers.inputs(rng, 200, K)).gram, 0.05)
    return w, h, quantize(jnp.asarray(w), SPEC)


def lower(h):
    """``M`` with ``MᵀM = h``, lower triangular."""
    return np.linalg.cholesky(np.linalg.inv(h)).T  # U, and M is its inverse transposed


@functools.partial(jax.jit, static_argnames=("sizes", "first"))
def sweep(matrix, error, codes, grid, *, sizes=(K,), first=True):
    groups = jnp.arange(K) // GROUP
    state = Rounded(error, codes, jnp.zeros_like(error), grid)
    return Sweep(SPEC, sizes, first)(Problem(matrix, groups), state)


def grid_of(q):
    return Grid(q.scales, q.zeros.astype(jnp.float32))


def gptq(layer, sizes=(K,)):
    w, h, q = layer
    matrix = np.linalg.inv(lower(h)).T
    codes = jnp.zeros((K, N), jnp.uint8)
    matrix = jnp.asarray(matrix, jnp.float32)
    return sweep(matrix, jnp.asarray(w), codes, grid_of(q), sizes=sizes)


METHODS = [layers.by_inverse, layers.by_brain_surgeon, layers.by_nearest_plane]


@pytest.mark.parametrize("method", METHODS)
def test_with_the_factor_it_is(method, layer):
    w, h, q = layer
    expected = method(w, h, layers.rounder(q), np.arange(K))
    np.testing.assert_allclose(w - gptq(layer).error, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - oracle.dequantize(q)).max() > 0.1  # not plain rounding


@pytest.mark.parametrize("sizes", [(1,), (3,), (4, 2), (8, 4), (12, 6, 2), (24, 8)])
def test_the_spans_change_nothing(sizes, layer):
    # the codes exactly: no sum of this layer comes near a tie
    np.testing.assert_array_equal(gptq(layer, sizes).codes, gptq(layer).codes)


def test_what_is_lost_row_by_row_is_the_output_error(layer):
    w, h, _ = layer
    done = gptq(layer)
    q = w.astype(np.float64) - np.asarray(done.error, np.float64)
    diagonal = np.diag(np.linalg.inv(lower(h)))
    losses = ((np.asarray(done.target, np.float64) - q) * diagonal[:, None]) ** 2
    assert losses.sum() == pytest.approx(layers.loss(h, done.error), rel=1e-5)


def test_with_the_hessian_it_is_coordinate_descent(layer):
    w, h, q = layer
    nearest = layers.rounder(q)
    start = gptq(layer)
    matrix = jnp.asarray(h, jnp.float32)
    got = sweep(matrix, start.error, start.codes, start.grid, sizes=(8, 4), first=False)
    expected = w - np.asarray(start.error, np.float64)
    for k in range(K):
        others = h[k] @ (w - expected) - h[k, k] * (w[k] - expected[k])
        expected[k] = nearest(k, w[k] + others / h[k, k])
    np.testing.assert_allclose(w - got.error, expected, rtol=1e-5, atol=1e-5)
    assert layers.loss(h, got.error) < 0.99 * layers.loss(h, start.error)


def test_no_single_code_can_be_better_in_the_end(layer):
    _, h, q = layer
    state, matrix = gptq(layer), jnp.asarray(h, jnp.float32)
    for _ in range(30):
        state = sweep(matrix, state.error, state.codes, state.grid, first=False)
    error = np.asarray(state.error, np.float64)
    step = oracle.spread(oracle.scale_values(q), q.block, q.shape)
    now = np.sum(error * (h @ error), 0)
    codes = np.asarray(state.codes, int)
    for k in range(K):
        for move in (-1, 1):
            other = error.copy()
            other[k] -= move * step[k]
            inside = (codes[k] + move >= 0) & (codes[k] + move <= 7)
            after = np.sum(other * (h @ other), 0)
            assert np.all((after >= now * (1 - 1e-5)) | ~inside)


@pytest.mark.parametrize("block", [1, 7, 32, 128, 4096])
@pytest.mark.parametrize("group", [0, 1, 16, 48, 128, 513, 4096])
def test_spans_lie_inside_each_other(block, group):
    sizes = spans(block, group)
    assert all(a % b == 0 and a > b for a, b in itertools.pairwise(sizes))
    assert not group or group in sizes
    assert group or sizes[0] == block
