"""GPTQ of whole weights, against its equations in NumPy and figures from papers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq.names import UnknownNameError
from jaxq.sharding import solved_on_mesh
from jaxq.solvers import Statistics, gptq, solve_with
from jaxq.spec import QuantSpec
from tests import oracle
from tests.solvers.layers import (
    by_inverse,
    damped,
    inputs,
    loss,
    nearest_codes,
    rounder,
    statistics,
)

K, N = 40, 12
UINT3 = QuantSpec("uint3", 16, False)  # groups of 16, 16 and 8


@functools.cache
def layer(seed=1, rows=K):
    rng = np.random.default_rng(seed)
    x = inputs(rng, 300, rows)
    return rng.standard_normal((rows, N)).astype(np.float32), statistics(x)


def run(w, seen, spec, contracting=(0,), stacked=(), **options):
    return solve_with(
        jnp.asarray(w),
        seen,
        spec=spec,
        solver="gptq",
        options=tuple(sorted(options.items())),
        contracting=contracting,
        stacked=stacked,
    )


# ------------------------------------------------ every kind of spec, order and search

CASES = [
    (QuantSpec("uint4", 16, False, scale="bfloat16"), {}),
    (QuantSpec("int3", 10, grid="gptq"), {"order": "group", "search": "mse"}),
    (QuantSpec("int2", "channel", grid="full"), {"search": "importance"}),
    (QuantSpec("int8", "tensor", scale="float16"), {"search": "absmax"}),
    (QuantSpec("nf4", 8, scale=QuantSpec("dynamic8", 16, center=True)), {}),
    (QuantSpec("fp4_e2m1", 16, scale="e8m0"), {"search": "output"}),
    (QuantSpec("fp4_bnb", (16, 4), scale="e4m3"), {"block_size": 8}),
    (QuantSpec("fp8_e5m2", "token"), {"order": "natural", "damping": 0.01}),
]


@pytest.mark.parametrize(("spec", "options"), CASES, ids=lambda v: str(v)[:60])
def test_the_codes_are_those_of_the_equations(spec, options):
    w, seen = layer()
    solved = run(w, seen, spec, **options)
    q, share = solved.weight, options.get("damping", 0.05)
    diagonal = np.diag(np.asarray(seen.gram))
    places = np.arange(K)
    if options.get("order") == "group":
        top = np.maximum.reduceat(diagonal, np.arange(0, K, 10))[places // 10]
        places = np.lexsort((-diagonal, places // 10, -top))
    elif options.get("order") != "natural":
        places = np.argsort(-diagonal, kind="stable")
    expected = by_inverse(w, damped(seen.gram, share), rounder(q), places)
    got = oracle.dequantize(q)
    # float32 and float64 may part at a tie, and all later rows of that column with it
    same = np.all(np.abs(got - expected) < 1e-5 + 1e-5 * np.abs(expected), 0)
    assert same.sum() >= N - 1
    assert bool(solved.info["ok"])
    plain = oracle.dequantize(nearest_codes(w, spec))
    assert loss(seen.gram, got - w) < 0.9 * loss(seen.gram, plain - w)


def test_scales_of_dynamic_groups_are_of_the_updated_weights():
    """Also those of groups inside a block."""
    w, seen = layer()
    how = {"order": "natural", "static_groups": False, "search": "absmax"}
    q = run(w, seen, UINT3, block_size=64, **how).weight
    u = np.linalg.cholesky(np.linalg.inv(damped(seen.gram, 0.05))).T
    rest, scales = w.astype(np.float64), oracle.scale_values(q)
    nearest = rounder(q)
    for k in range(K):
        if k % 16 == 0:
            group = rest[k : k + 16]
            wide = np.maximum(group.max(0), 0) - np.minimum(group.min(0), 0)
            np.testing.assert_allclose(scales[k // 16], wide / 7, rtol=1e-4)
        error = (rest[k] - nearest(k, rest[k])) / u[k, k]
        rest[k:] -= np.outer(u[k, k:], error)
    static = run(w, seen, UINT3, order="natural", search="absmax").weight
    assert np.abs(oracle.scale_values(static)[1:] / scales[1:] - 1).max() > 0.01
    np.testing.assert_array_equal(static.scales[0], q.scales[0])


def test_a_diagonal_gram_is_plain_rounding():
    w, seen = layer()
    seen = seen._replace(gram=jnp.diag(jnp.diagonal(seen.gram)))
    plain = nearest_codes(w, UINT3)
    got = run(w, seen, UINT3, search="absmax").weight
    jax.tree.map(np.testing.assert_array_equal, got, plain)


# ---------------------------------------------------------------------------- figures


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.63), (3, 0.54), (4, 0.50)])
def test_the_error_of_a_correlated_layer(bits, ratio):
    """Errors over those of rounding: in natural order, in that of activations, best."""
    rng = np.random.default_rng(bits)
    w = rng.standard_normal((128, 64)).astype(np.float32)
    seen = statistics(inputs(rng, 1000, 128))
    spec = QuantSpec(f"uint{bits}", 128, False)
    plain = loss(seen.gram, oracle.dequantize(nearest_codes(w, spec)) - w)

    def measured(**options):
        q = run(w, seen, spec, damping=0.01, **options).weight
        return loss(seen.gram, oracle.dequantize(q) - w) / plain

    natural = measured(search="absmax", order="natural")
    assert natural == pytest.approx(ratio, abs=0.07)
    if bits == 2:
        ordered = measured(search="absmax")
        assert ordered < 0.75 * natural
        assert measured(sweeps=2) < 0.6 * ordered


def test_small_problems_are_nearly_always_better_than_rounding():
    """Four rows, two bits: rounding beats it in few of them."""
    rng = np.random.default_rng(0)
    count = 200
    x = rng.standard_normal((count, 12, 4)) @ rng.standard_normal((count, 4, 4))
    w = rng.standard_normal((count, 4, 1)).astype(np.float32)
    seen = statistics(x)
    spec = QuantSpec("uint2", "channel", False)
    how = {"search": "absmax", "order": "natural", "damping": 0.0}
    solved = run(w, seen, spec, (1,), (0,), **how)
    plain = nearest_codes(w, spec, (1,), (0,))
    scale, zero = np.asarray(plain.scales, float), np.asarray(plain.zeros, float)
    combined = np.array(list(itertools.product(range(4), repeat=4)))[:, :, None]

    def losses(values):
        error = values - w
        return np.einsum("pkn,pkl,pln->p", error, np.asarray(seen.gram), error)

    every = [losses((codes - zero) * scale) for codes in combined]
    best, mine = np.min(every, 0), losses(oracle.dequantize(solved.weight))
    rounded = losses(oracle.dequantize(plain))
    assert np.all(best <= mine * (1 + 1e-4))
    assert np.mean(mine <= rounded * (1 + 1e-4)) == pytest.approx(0.93, abs=0.05)
    assert best.mean() < mine.mean() < 0.9 * rounded.mean()


# ------------------------------------------------------------------------------ drift


def drifted(scale):
    rng = np.random.default_rng(7)
    x = inputs(rng, 400, K).astype(np.float64)
    moved = scale * rng.standard_normal(x.shape) * x.std(0)
    w, _ = layer()
    return w, x, moved, statistics(x, moved)


def outputs_apart(w, x, moved, q):
    """``‖X_q Q − X_float W‖²`` over the energy of the output."""
    out = (x + moved) @ w
    return np.sum((x @ oracle.dequantize(q) - out) ** 2) / np.sum(out**2)


@pytest.mark.parametrize("correction", ["gptaq", "target"])
def test_without_drift_it_is_gptq(correction):
    w, _, _, seen = drifted(0.0)
    plain = run(w, seen._replace(drift=None), UINT3)
    got = run(w, seen, UINT3, drift=1.0, correction=correction)
    jax.tree.map(np.testing.assert_array_equal, got.weight, plain.weight)


def test_drift_is_fed_back_as_gptaq_does():
    w, _, _, seen = drifted(0.3)
    q = run(w, seen, UINT3, drift=1.0).weight
    order = np.argsort(-np.diag(np.asarray(seen.gram)), kind="stable")
    square = np.ix_(order, order)
    u = np.linalg.cholesky(np.linalg.inv(damped(seen.gram, 0.05)[square])).T
    p = np.triu(np.asarray(seen.drift, np.float64)[square] @ u.T, 1) @ u
    rest, nearest = w[order].astype(np.float64), rounder(q)
    out = np.zeros(w.shape)
    for k, row in enumerate(order):
        now = rest[k].copy()
        out[row] = nearest(row, now)
        rest[k:] -= np.outer(u[k, k:], (now - out[row]) / u[k, k])
        rest[k + 1 :] += np.outer(p[k, k + 1 :], now)
    same = np.all(np.abs(oracle.dequantize(q) - out) < 1e-4, 0)
    assert same.sum() >= N - 1


def test_the_output_comes_nearer_to_the_float_stream():
    w, x, moved, seen = drifted(0.3)
    plain = run(w, seen._replace(drift=None), UINT3)
    fed = run(w, seen, UINT3, drift=1.0)
    solved = run(w, seen, UINT3, drift=1.0, correction="target")
    a, b, c = (outputs_apart(w, x, moved, s.weight) for s in (plain, fed, solved))
    assert c < b < a


# ------------------------------------------------------------- weights of other shapes


def test_stacks_are_solved_each_for_itself(rng):
    """Two stacked axes, one in the middle; two contracted axes."""
    shape = (2, 4, 3, 8, 5)  # stack, contracted, stack, contracted, free
    w = rng.standard_normal(shape).astype(np.float32)
    x = np.stack([inputs(rng, 100, 32) for _ in range(6)]).reshape(2, 3, 100, 32)
    seen = statistics(x)
    spec = QuantSpec("uint3", 16, False, scale="bfloat16")
    how = {"compensated": True, "search": "absmax"}
    got = run(w, seen, spec, (1, 3), (0, 2), **how)
    like = nearest_codes(w, spec, (1, 3), (0, 2))
    assert jax.tree.structure(got.weight) == jax.tree.structure(like)
    assert got.info["ok"].shape == (2, 3)
    values = oracle.dequantize(got.weight)
    for i, j in ((0, 2), (1, 0)):
        mine = Statistics(seen.gram[i, j], seen.tokens[i, j])
        alone = run(w[i, :, j], mine, spec, (0, 1), **how)
        np.testing.assert_array_equal(values[i, :, j], oracle.dequantize(alone.weight))
        np.testing.assert_array_equal(got.compensated[i, :, j], alone.compensated)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_is_placed_like_the_weight(kind):
    w, seen = layer(rows=64)
    devices = np.asarray(jax.devices()).reshape(2, 4)
    mesh = Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)
    placed = jax.device_put(w, NamedSharding(mesh, P("data", "model")))
    how = {"search": "absmax", "sweeps": 1}
    got = solved_on_mesh(lambda x: run(x, seen, UINT3, **how), placed).weight
    alone = run(w, seen, UINT3, **how).weight
    np.testing.assert_array_equal(got.codes, alone.codes)
    np.testing.assert_array_equal(got.zeros, alone.zeros)
    # sums over devices are rounded in another order
    np.testing.assert_allclose(got.scales, alone.scales, rtol=1e-6)
    assert got.codes.sharding.spec == got.scales.sharding.spec == P("data", "model")


# ------------------------------------------------------------------ hard and bad input


def test_a_dead_row_is_rounded_to_nearest_and_alone():
    w, seen = layer()
    gram = np.array(seen.gram)
    gram[[5, 20]] = gram[:, [5, 20]] = 0
    dead = seen._replace(gram=jnp.asarray(gram))
    q = run(w, dead, UINT3).weight
    nearest, got = rounder(q), oracle.dequantize(q)
    for row in (5, 20):
        np.testing.assert_allclose(got[row], nearest(row, w[row]), atol=1e-6)
    # and the others as if they were not there
    alive = np.delete(np.arange(K), [5, 20])
    h = damped(gram[np.ix_(alive, alive)], 0.05)
    places = np.argsort(-np.diag(h), kind="stable")
    among = lambda row, x: nearest(alive[row], x)
    expected = by_inverse(w[alive], h, among, places)
    same = np.all(np.abs(got[alive] - expected) < 1e-5, 0)
    assert same.sum() >= N - 1


@pytest.mark.parametrize("tokens", [1, 10])
def test_few_tokens_are_enough_to_be_better_on_them(tokens):
    w, _ = layer()
    seen = statistics(inputs(np.random.default_rng(3), tokens, K))
    solved = run(w, seen, UINT3)
    assert bool(solved.info["ok"])
    plain = oracle.dequantize(nearest_codes(w, UINT3))
    mine = oracle.dequantize(solved.weight)
    assert loss(seen.gram, mine - w) < 0.2 * loss(seen.gram, plain - w)


def test_damping_grows_when_there_is_too_little(rng):
    w, _ = layer()
    x = inputs(rng, 3, K).astype(np.float64)
    seen = statistics(x)
    # rounding of the sums has made it a little indefinite
    gram = seen.gram - 1e-4 * jnp.mean(jnp.diagonal(seen.gram)) * jnp.eye(K)
    solved = run(w, seen._replace(gram=gram), UINT3, damping=0.0)
    assert bool(solved.info["ok"])
    assert int(solved.info["tries"]) == 2
    assert float(solved.info["damping"]) == pytest.approx(0.001)


@pytest.mark.parametrize("wrong", ["nan", "inf", "zero", "indefinite"])
def test_without_a_usable_gram_it_is_rounding_with_the_same_scales(wrong):
    w, seen = layer()
    gram = {
        "nan": seen.gram.at[0, 1].set(jnp.nan),
        "inf": seen.gram.at[3, 3].set(jnp.inf),
        "zero": jnp.zeros_like(seen.gram),
        "indefinite": seen.gram.at[0, 1].set(1e9).at[1, 0].set(1e9),
    }[wrong]
    solved = run(w, seen._replace(gram=gram), UINT3, compensated=True)
    assert not bool(solved.info["ok"])
    q = solved.weight
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(q))
    nearest = rounder(q)
    expected = np.stack([nearest(k, w[k]) for k in range(K)])
    np.testing.assert_allclose(oracle.dequantize(q), expected, atol=1e-6)
    np.testing.assert_array_equal(solved.compensated, w)
    # and the scales are those of a search without activations
    plain = run(w, seen._replace(gram=jnp.eye(K)), UINT3).weight
    np.testing.assert_allclose(q.scales, plain.scales, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (UINT3, {"block_size": 0}, "block_size=0 must be an integer >= 1"),
        (UINT3, {"sweeps": 1.5}, "sweeps=1.5 must be an integer >= 0"),
        (UINT3, {"damping": -0.1}, r"damping=-0.1 must lie in \[0, 1\]"),
        (UINT3, {"drift": 2}, r"drift=2 must lie in \[0, 1\]; 0.25"),
        (UINT3, {"drift": 0.25}, "needs statistics of the drift"),
        (UINT3, {"drift": 0.25, "sweeps": 1}, "use correction='target', or sweeps=0"),
        (UINT3, {"static_groups": False}, "a group never begins"),
        (QuantSpec("int8", center=True), {}, "center=True"),
        (
            QuantSpec("nf4", 8, scale=QuantSpec("int8", 8)),
            {"static_groups": False, "order": "group"},
            "this spec quantizes them together",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(spec, options, message):
    w, seen = layer()
    with pytest.raises(ValueError, match=message):
        gptq(jnp.asarray(w), seen, spec, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "activations"}, "order 'activations'; did you mean 'activation'"),
        ({"search": "ms"}, "scale search 'ms'; did you mean 'mse'"),
        ({"dampin": 0.1}, "option of search='conditional': 'dampin'"),
        ({"correction": "gptq"}, "correction 'gptq'; did you mean 'gptaq'"),
    ],
)
def test_an_unknown_name_is_refused(options, message):
    w, seen = layer()
    with pytest.raises(UnknownNameError, match=message):
        gptq(jnp.asarray(w), seen, UINT3, **options)


def test_statistics_must_be_there_and_fit():
    w, seen = layer()
    with pytest.raises(ValueError, match="gptq needs the Gram matrix"):
        gptq(jnp.asarray(w), None, UINT3)
    with pytest.raises(ValueError, match=r"shape \(40, 40\).*contracts 32 elements"):
        gptq(jnp.asarray(w[:32]), seen, UINT3)
