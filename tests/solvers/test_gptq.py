"""GPTQ against OBQ, nearest-plane and its own equations in NumPy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.quantize import quantize
from jaxq.solvers import gptq, rtn
from jaxq.spec import QuantSpec
from tests import oracle
from tests.solvers.layers import inputs, loss, statistics

PLAIN = {"search": "absmax", "order": "natural"}


def damped(gram, share=0.05):
    gram = np.asarray(gram, np.float64)
    return gram + share * np.mean(np.diag(gram)) * np.eye(len(gram))


def rounder(q):
    """``(row, values) -> values`` on the grid of ``q``, a uniform asymmetric one."""
    scale = oracle.spread(oracle.scale_values(q), q.block, q.shape)
    zero = oracle.spread(np.asarray(q.zeros, np.float64), q.block, q.shape)
    top = 2**q.spec.bits - 1

    def nearest(row, x):
        code = np.clip(np.rint(x / scale[row]) + zero[row], 0, top)
        return (code - zero[row]) * scale[row]

    return nearest


def by_inverse(w, h, nearest, order):
    """Frantar et al.'s equations: errors spread by the factor of the inverse."""
    w, out = w[order].astype(np.float64), np.zeros(w.shape)
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    for i, row in enumerate(order):
        out[row] = nearest(row, w[i])
        w[i:] -= np.outer(u[i, i:], (w[i] - out[row]) / u[i, i])
    return out


def by_brain_surgeon(w, h, nearest, order):
    """OBQ: after every row the inverse is downdated, in a fixed order."""
    w, out = w.astype(np.float64), np.zeros(w.shape)
    inverse = np.linalg.inv(h)
    for row in order:
        out[row] = nearest(row, w[row])
        error = (w[row] - out[row]) / inverse[row, row]
        w -= np.outer(inverse[row], error)
        inverse = inverse - np.outer(inverse[row], inverse[row]) / inverse[row, row]
        inverse[row, row] = 1.0
    return out


def by_nearest_plane(w, h, nearest, order):
    """Babai: the last row of a triangular system is rounded first."""
    back = order[::-1]
    r = np.linalg.cholesky(h[np.ix_(back, back)]).T  # hᵣ = rᵀr
    out, goal = np.zeros(w.shape), r @ w[back].astype(np.float64)
    for i in reversed(range(len(back))):
        rest = goal[i] - r[i, i + 1 :] @ out[back][i + 1 :]
        out[back[i]] = nearest(back[i], rest / r[i, i])
    return out


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(1)
    x = inputs(rng, 200, 24)
    return rng.standard_normal((24, 16)).astype(np.float32), statistics(x)


SPEC = QuantSpec("uint3", 8, False)


@pytest.mark.parametrize("method", [by_inverse, by_brain_surgeon, by_nearest_plane])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_the_codes_are_those_of(method, order, layer):
    w, seen = layer
    got = gptq(jnp.asarray(w), seen, SPEC, search="absmax", order=order).weight
    places = np.arange(24)
    if order == "activation":
        places = np.argsort(-np.diag(np.asarray(seen.gram)), kind="stable")
    expected = method(w, damped(seen.gram), rounder(got), places)
    np.testing.assert_allclose(oracle.dequantize(got), expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected - oracle.dequantize(quantize(jnp.asarray(w), SPEC))).max()


@pytest.mark.parametrize("size", [1, 3, 4, 8, 64])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_the_block_size_changes_nothing(size, order, layer):
    w, seen = layer
    run = lambda n: gptq(jnp.asarray(w), seen, SPEC, order=order, block_size=n).weight
    np.testing.assert_array_equal(run(size).codes, run(24).codes)


def test_a_diagonal_gram_is_plain_rounding(layer):
    w, seen = layer
    seen = seen._replace(gram=jnp.diag(jnp.diagonal(seen.gram)))
    plain = rtn(jnp.asarray(w), None, SPEC)
    for order in ("natural", "activation", "group"):
        got = gptq(jnp.asarray(w), seen, SPEC, search="absmax", order=order).weight
        jax.tree.map(np.testing.assert_array_equal, got, plain)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_of_a_correlated_layer(bits):
    """Ratios to rounding of about a half, and lower still in order of activation."""
    rng = np.random.default_rng(bits)
    w = rng.standard_normal((128, 64)).astype(np.float32)
    seen = statistics(inputs(rng, 512, 128))
    spec = QuantSpec(f"uint{bits}", 128, False)
    plain = loss(seen.gram, oracle.dequantize(rtn(jnp.asarray(w), None, spec)) - w)

    def ratio(**options):
        q = gptq(jnp.asarray(w), seen, spec, **options).weight
        return loss(seen.gram, oracle.dequantize(q) - w) / plain

    natural = ratio(**PLAIN)
    ordered = ratio(search="absmax")
    assert 0.4 < natural < 0.75
    assert ordered < 0.8 * natural
    assert ratio() < ordered
