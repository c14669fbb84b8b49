"""Refinement: every step is the best one, and none makes the loss larger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import FORMATS
from jaxq.solvers import gptq, layer_loss
from jaxq.solvers.feedback import Grid, Problem, Rounded
from jaxq.solvers.matrix import MatrixView
from jaxq.solvers.order import by_slots, natural
from jaxq.solvers.refine import Refit, refining
from jaxq.spec import QuantSpec
from pallas_kernels import layouts
from tests import oracle
from tests.solvers import layers
from tests.solvers.layers import damped, inputs, nearest_codes, statistics

K, N = 40, 12


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(3)
    return rng.standard_normal((K, N)).astype(np.float32), inputs(rng, 200, K)


SPECS = [
    QuantSpec("uint2", 16, False, scale="bfloat16"),  # 16, 16 and 8
    QuantSpec("int3", 8, grid="full"),
    QuantSpec("fp4_e2m1", (10, 4), scale="e8m0"),  # rounded down, so often worse
    QuantSpec("int4", "tensor"),
    QuantSpec("nf4", 8, scale=QuantSpec("dynamic8", 16, center=True)),
]


def held(q):
    """Every number that each element of ``q`` could hold, ``[2^b, K, N]``."""
    scale = oracle.spread(oracle.scale_values(q), q.block, q.shape)
    zero = np.zeros(q.shape)
    if q.zeros is not None:
        zero = oracle.spread(np.asarray(q.zeros, np.float64), q.block, q.shape)
    every = np.arange(2**q.spec.bits, dtype="uint8")
    numbers = np.asarray(FORMATS[q.spec.format].decode(every), np.float64)
    low, high = q.spec.code_range
    numbers = numbers[(numbers >= low) & (numbers <= high)]
    return (numbers[:, None, None] - zero) * scale


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.describe())
def test_the_loss_never_grows(spec, layer):
    w, x = layer
    h = damped(statistics(x).gram, 0.05)
    q = nearest_codes(w, spec)
    view = MatrixView.of((K, N), spec, 0)
    sweep = refining(view, spec, 16)
    order = by_slots(natural(view, jnp.ones(K), 1), view, sweep.spans[0])
    problem = Problem(
        order.take(order.take(jnp.asarray(h, jnp.float32)), axis=1),
        jnp.asarray(order.groups),
        jnp.full(order.length, 1e-30),
    )
    zero = None if q.zeros is None else q.zeros.astype(jnp.float32)
    grid = jax.tree.map(view.grid_to_groups, Grid(q.scale_values(), zero))
    codes = layouts.unpack(q.codes, spec.bits, 0, q.pack)[:K]
    error = jnp.asarray(w - oracle.dequantize(q), jnp.float32)
    state = Rounded(error, codes, jnp.zeros_like(error), grid).map_rows(order.take)
    spare = order.length // view.slots.shape[1] - len(view.slots)
    pad = lambda g: jnp.pad(g, ((0, spare), (0, 0)))
    state = state._replace(grid=jax.tree.map(pad, grid))
    once, losses = jax.jit(sweep), [layers.loss(h, error)]
    for _ in range(5):
        state = once(problem, state)
        losses.append(layers.loss(h, order.back(state.error)))
    assert losses[1] < 0.9 * losses[0]
    assert np.all(np.diff(losses) <= 1e-6 * losses[0])
    assert losses[-1] < losses[1]


@pytest.fixture(scope="module")
def refined(layer):
    """GPTQ without and with sweeps."""
    w, x = layer
    return [gptq(jnp.asarray(w), statistics(x), SPECS[0], sweeps=n, compensated=True)
            for n in (0, 2)]  # fmt: skip


def test_what_was_rounded_still_rounds_to_the_codes(refined):
    for solved in refined:
        target = np.asarray(solved.compensated, np.float64)
        mine = np.abs(oracle.dequantize(solved.weight) - target)
        nearest = np.abs(held(solved.weight) - target).min(0)
        np.testing.assert_allclose(mine, nearest, atol=1e-5)


def test_it_is_better_than_gptq(refined, layer):
    w, x = layer
    plain, better = (oracle.dequantize(s.weight) for s in refined)
    h = damped(statistics(x).gram, 0.05)
    assert layers.loss(h, better - w) < 0.95 * layers.loss(h, plain - w)


def test_scales_stay_what_can_be_stored(refined):
    before, after = (solved.weight for solved in refined)
    assert after.scales.dtype == jnp.bfloat16
    changed = np.asarray(before.scales) != np.asarray(after.scales)
    assert changed.mean() > 0.5
    np.testing.assert_array_equal(before.zeros, after.zeros)


def test_a_refitted_scale_solves_the_least_squares_problem(layer):
    w, x = layer
    rng = np.random.default_rng(0)
    spec = QuantSpec("uint3", 16, False)
    view = MatrixView.of((K, N), spec, 0)
    h = damped(statistics(x).gram, 0.05)[:16, :16]
    codes = rng.integers(0, 8, (16, N)).astype(np.uint8)
    zero = rng.integers(0, 8, (3, N)).astype(np.float32)
    scale = rng.uniform(0.2, 0.4, (3, N)).astype(np.float32)
    fed = rng.standard_normal((16, N))
    v = codes - zero[1].astype(np.float64)
    error = w[16:32] - v * scale[1]
    state = Rounded(
        jnp.asarray(error, jnp.float32),
        jnp.asarray(codes),
        None,
        Grid(jnp.asarray(scale), jnp.asarray(zero)),
    )
    ridge = np.full(16, 0.25 * h[0, 0])
    problem = Problem(
        jnp.asarray(h - np.diag(ridge), jnp.float32),
        jnp.ones(16, jnp.int32),
        jnp.asarray(ridge, jnp.float32),
    )
    got = jax.jit(Refit(view, spec))(problem, state, jnp.asarray(fed, jnp.float32))
    for n in range(N):
        best = v[:, n] @ (h @ w[16:32, n] + fed[:, n]) / (v[:, n] @ h @ v[:, n])
        # a scale does not change its sign
        best = best if best > 0 else scale[1, n]
        assert float(got.grid.scale[1, n]) == pytest.approx(best, rel=1e-4)
    np.testing.assert_array_equal(got.grid.scale[0], scale[0])
    np.testing.assert_allclose(
        got.error, w[16:32] - v * np.asarray(got.grid.scale[1]), atol=1e-5
    )


def test_without_a_usable_gram_nothing_is_refined(layer):
    w, x = layer
    seen = statistics(x)
    bad = seen._replace(gram=seen.gram.at[0, 0].set(jnp.nan))
    how = {"compensated": True}
    plain, swept = (
        gptq(jnp.asarray(w), bad, SPECS[0], sweeps=n, **how) for n in (0, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, swept)
    assert not bool(swept.info["ok"])


def test_the_loss_of_a_layer(layer):
    w, x = layer
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((2, 8, 3, 5, 2)).astype(np.float32)
    near = weight + 0.1 * rng.standard_normal(weight.shape).astype(np.float32)
    activations = rng.standard_normal((2, 60, 40))
    gram = statistics(activations).gram
    got = layer_loss(weight, near, gram, axis=(1, 3), stacked=(0,))
    for i in range(2):
        error = np.einsum(
            "tab,acbd->tcd", activations[i].reshape(60, 8, 5), weight[i] - near[i]
        )
        assert float(got[i]) == pytest.approx(np.sum(error**2), rel=1e-5)
    q = nearest_codes(w, QuantSpec("int4"))
    of_q = layer_loss(jnp.asarray(w), q, statistics(x).gram, axis=0)
    exact = np.sum((x.astype(np.float64) @ (oracle.dequantize(q) - w)) ** 2)
    assert float(of_q) == pytest.approx(exact, rel=1e-4)
