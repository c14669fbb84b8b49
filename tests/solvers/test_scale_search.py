"""Scales by what activations make of errors, against brute force in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.names import UnknownNameError
from jaxq.quantize import Blocking, block_bounds, quantize
from jaxq.solvers import rtn
from jaxq.solvers.matrix import MatrixView
from jaxq.solvers.scale_search import WIDEST, check_search
from jaxq.spec import QuantSpec
from tests import oracle
from tests.solvers.layers import inputs, nearest_codes, statistics

K, N, GROUP = 40, 6, 16
SPECS = {
    "uint2": QuantSpec("uint2", GROUP, False),
    "uint4": QuantSpec("uint4", GROUP, False, scale="bfloat16"),
    "int3": QuantSpec("int3", GROUP, grid="full"),
    "nf4": QuantSpec("nf4", GROUP),
}


@pytest.fixture
def layer(rng):
    x = inputs(rng, 300, K)
    return rng.standard_t(4, (K, N)).astype(np.float32), statistics(x)


def costs(w, got, gram, clip):
    """What every (group, column) costs by the measure of a search, float64."""
    error = got - w.astype(np.float64)
    total = []
    for start in range(0, K, GROUP):
        rows = slice(start, start + GROUP)
        h = np.asarray(gram, np.float64)[rows, rows]
        h = np.diag(np.diag(h)) if clip == "importance" else h
        total.append(np.sum(error[rows] * (h @ error[rows]), 0))
    return np.asarray(total)


@functools.partial(jax.jit, static_argnames=("spec", "clip", "axis"))
def run(w, seen, spec, clip, axis=(0,)):
    return rtn(w, seen, spec, axis=axis, clip=clip)


@functools.partial(jax.jit, static_argnames="spec")
def in_range(w, p, spec):
    """Rounded to nearest in ``p`` times the whole range."""
    where = Blocking.of(spec, w.shape)
    low, high = block_bounds(w, where.block)
    return quantize(w, spec, bounds=(low * p, high * p))


@pytest.mark.parametrize("clip", ["importance", "output"])
@pytest.mark.parametrize("name", SPECS)
def test_no_plain_range_costs_less(name, clip, layer):
    w, seen = layer
    spec = SPECS[name]
    q = run(jnp.asarray(w), seen, spec, clip)
    mine = costs(w, oracle.dequantize(q), seen.gram, clip)
    steps = 48 if clip == "importance" else 24
    tried = [1.0, *np.linspace(WIDEST, 0.2, steps - steps // 3)]
    every = []
    for p in tried:
        plain = in_range(jnp.asarray(w), jnp.float32(p), spec)
        every.append(costs(w, oracle.dequantize(plain), seen.gram, clip))
    best = np.min(every, 0)
    assert np.all(mine <= best * (1 + 1e-4))
    # ranges between those, and other zero points, find more
    assert mine.sum() < (0.995 if name != "nf4" else 1.0) * best.sum()
    assert best.sum() < 0.9 * every[0].sum()
    plain = nearest_codes(w, spec)
    assert jax.tree.structure(plain) == jax.tree.structure(q)


def test_the_zero_point_may_be_a_neighbour_of_what_the_range_gives(layer):
    w, seen = layer
    spec = SPECS["uint2"]
    q = run(jnp.asarray(w), seen, spec, "importance")
    scale = oracle.scale_values(q)
    low = np.minimum([w[i : i + GROUP].min(0) for i in range(0, K, GROUP)], 0)
    high = np.maximum([w[i : i + GROUP].max(0) for i in range(0, K, GROUP)], 0)
    p = scale * 3 / (high - low)
    usual = np.clip(np.rint(-p * low / scale), 0, 3)
    off = np.asarray(q.zeros, int) - usual
    assert set(np.unique(off)) == {-1, 0, 1}


@pytest.mark.parametrize("clip", ["importance", "output"])
def test_a_gram_that_is_not_finite_counts_all_rows_the_same(clip, layer):
    w, seen = layer
    gram = np.array(seen.gram)
    gram[1, 2] = np.nan
    bad = seen._replace(gram=jnp.asarray(gram))
    alike = seen._replace(gram=jnp.eye(K, dtype=jnp.float32))
    spec = SPECS["uint4"]
    got = run(jnp.asarray(w), bad, spec, clip)
    expected = run(jnp.asarray(w), alike, spec, clip)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_row_that_no_activation_reaches_has_no_say(layer):
    w, seen = layer
    w[3] = 50.0  # it would take the whole range
    gram = np.array(seen.gram)
    gram[3] = gram[:, 3] = 0
    dead = seen._replace(gram=jnp.asarray(gram))
    spec = SPECS["uint4"]
    q = run(jnp.asarray(w), dead, spec, "importance")
    assert np.all(oracle.scale_values(q)[0] < 50 / 15 / 2)


def test_blocks_of_several_axes_are_searched_alike(rng):
    w = rng.standard_normal((4, 8, 5)).astype(np.float32)
    seen = statistics(inputs(rng, 100, 32))
    spec = QuantSpec("uint3", 16, False)
    got = run(w, seen, spec, "importance", (0, 1))
    flat = run(w.reshape(32, 5), seen, spec, "importance", (0,))
    np.testing.assert_array_equal(
        oracle.dequantize(got).reshape(32, 5), oracle.dequantize(flat)
    )
    assert MatrixView.of(w.shape, spec, (0, 1)).slots.shape == (2, 16)


# ------------------------------------------------------------------------- bad input


def test_activations_are_needed(layer):
    with pytest.raises(ValueError, match=r"clip='output' needs the Gram matrix"):
        rtn(jnp.asarray(layer[0]), None, SPECS["nf4"], clip="output")


def test_a_gram_of_another_shape_is_refused(layer):
    w, seen = layer
    with pytest.raises(ValueError, match=r"gram of one weight has shape \(40, 40\)"):
        rtn(jnp.asarray(w[:32]), seen, SPECS["nf4"], clip="output")


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        ("importanc", {}, "scale search 'importanc'; did you mean 'importance'"),
        ("output", {"exponent": 2}, "option of search='output': 'exponent'"),
        ("mse", {"step": 2}, "'step'; did you mean 'steps'"),
    ],
)
def test_an_unknown_option_is_refused(search, options, message):
    with pytest.raises(UnknownNameError, match=message):
        check_search(search, tuple(options.items()))


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("steps", 2.5), ("smallest", 0), ("smallest", 2)]
)
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        check_search("mse", ((name, value),))
