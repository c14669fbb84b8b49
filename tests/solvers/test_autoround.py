"""Block tuning: the published gains, never worse than its start, compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.quantize import quantize
from jaxq.solvers import Statistics, gptq, rtn
from jaxq.solvers.autoround import Problem, Samples, Settings, tune
from jaxq.spec import QuantSpec
from tests import oracle

K, N, TOKENS, BATCHES = 128, 48, 512, 8
UINT3 = QuantSpec("uint3", 64, False, scale="bfloat16")
# from rounding to nearest: half a gap on the way, and codes that follow their range
PUBLISHED = Settings(lr=1 / 200, range_lr=1 / 200, ranges="ends")
SHORT = Settings(steps=24, lr=1 / 24, range_lr=1 / 24, batch=2, checks=4, ranges="ends")


def linear(weights, x):
    return x @ weights["w"]


def mlp(weights, x):
    return x + jax.nn.silu(x @ weights["up"]) @ weights["down"] * weights["gain"]


def activations(rng, rows=K):
    """``[BATCHES, tokens, rows]``; neighbours correlate by 0.77."""
    lag = np.abs(np.subtract.outer(np.arange(rows), np.arange(rows)))
    mix = np.linalg.cholesky(0.77**lag)
    x = rng.standard_normal((TOKENS, rows)) @ mix.T
    return jnp.asarray(x.reshape(BATCHES, -1, rows), jnp.float32)


def matrix(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)


def layer(rng, spec=UINT3, clip="absmax"):
    w, x = matrix(rng, K, N), activations(rng)
    return {"w": Problem(w, rtn(w, None, spec, clip=clip))}, Samples(x, x @ w)


def block(rng, spec=UINT3):
    """A gated layer whose second matrix follows the first through a nonlinearity."""
    weights = {"up": matrix(rng, 32, 64), "down": matrix(rng, 64, 32)}
    fixed = {"gain": jnp.asarray(rng.uniform(0.5, 1.5, 32), jnp.float32)}
    x = activations(rng, 32)
    target = mlp({**weights, **fixed}, x)
    spec = dataclasses.replace(spec, block=16)
    problems = {n: Problem(w, quantize(w, spec)) for n, w in weights.items()}
    return problems, Samples(x, target), fixed


def loss(run, weights, samples, fixed=None):
    """The relative error of the block on all samples, of the numbers as stored."""
    weights = {n: jnp.asarray(oracle.dequantize(q), "f4") for n, q in weights.items()}
    y = np.asarray(run({**weights, **(fixed or {})}, samples.inputs), np.float64)
    mask = 1 if samples.mask is None else np.asarray(samples.mask)[..., None]
    target = np.asarray(samples.targets, np.float64)
    return np.sum(mask * (y - target) ** 2) / np.sum(mask * target**2)


# --------------------------------------------------------------------- what it gains


@pytest.mark.parametrize(("bits", "published"), [(4, 0.732), (3, 0.644), (2, 0.478)])
def test_a_correlated_layer_gains_what_sign_descent_is_known_to(bits, published, rng):
    """AutoRound's own settings, from rounding to nearest."""
    problems, samples = layer(rng, QuantSpec(f"uint{bits}", 64, False))
    settings = dataclasses.replace(PUBLISHED, steps=200, momentum=0.0, checks=20)
    tuned = tune(linear, problems, samples, settings, key=jax.random.key(0))
    ratio = float(tuned.best_loss / tuned.start_loss)
    assert ratio == pytest.approx(published, rel=0.12)


@pytest.mark.parametrize(
    "spec",
    [
        UINT3,
        QuantSpec("int2", 16),
        QuantSpec("int3", 16, grid="gptq", scale="float16"),
        QuantSpec("int3", 16, grid="full"),
        QuantSpec("nf4", 16),
        QuantSpec("fp4_e2m1", 16, scale="e8m0"),
    ],
    ids=lambda s: s.describe(),
)
def test_a_block_with_a_nonlinearity_improves(spec, rng):
    problems, samples, fixed = block(rng, spec)
    settings = dataclasses.replace(SHORT, steps=100, lr=0.01, range_lr=0.01, batch=4)
    tuned = tune(mlp, problems, samples, settings, fixed=fixed, key=jax.random.key(0))
    start = {name: p.start for name, p in problems.items()}
    before = loss(mlp, start, samples, fixed)
    after = loss(mlp, tuned.weights, samples, fixed)
    assert after < 0.8 * before
    assert float(tuned.start_loss) == pytest.approx(before, rel=1e-4)
    # what was optimized is what is stored
    assert float(tuned.best_loss) == pytest.approx(after, rel=1e-4)


def test_ranges_help(rng):
    problems, samples = layer(rng, QuantSpec("uint2", 64, False, scale="bfloat16"))
    settings = dataclasses.replace(PUBLISHED, steps=200, checks=4)
    fixed = dataclasses.replace(settings, ranges="fixed")
    learned = tune(linear, problems, samples, settings, key=jax.random.key(0))
    kept = tune(linear, problems, samples, fixed, key=jax.random.key(0))
    start, q = problems["w"].start, kept.weights["w"]
    assert float(learned.best_loss) < 0.9 * float(kept.best_loss)
    np.testing.assert_array_equal(q.scales, start.scales)
    np.testing.assert_array_equal(q.zeros, start.zeros)
    assert not np.array_equal(learned.weights["w"].scales, start.scales)


# ------------------------------------------------------------- from where GPTQ ends


def test_learned_scales_gain_on_what_gptq_found_where_learned_ends_lose(rng):
    """No code moves: every step that scales take is downhill, once they are small."""
    problems, samples = layer(rng)
    w, plain = problems["w"]
    x = samples.inputs.reshape(-1, K)
    statistics = Statistics(gram=x.T @ x, tokens=jnp.int32(len(x)))
    solved = gptq(w, statistics, UINT3, damping=0.01, compensated=True)
    start = {"w": Problem(solved.compensated, solved.weight)}
    assert loss(linear, {"w": solved.weight}, samples) < 0.7 * loss(
        linear, {"w": plain}, samples
    )
    last = {}
    for ranges in ("scale", "ends"):
        settings = Settings(steps=40, lr=1e-9, range_lr=0.002, ranges=ranges, checks=1)
        tuned = tune(linear, start, samples, settings, key=jax.random.key(0))
        last[ranges] = float(tuned.checked[-1] / tuned.start_loss)
    assert last["scale"] < 0.99
    assert last["ends"] > 1.05


# ----------------------------------------------------------------- never worse


def test_the_best_of_what_was_checked_is_kept(rng):
    problems, samples, fixed = block(rng)
    # steps so long that most make it worse
    settings = Settings(steps=30, lr=0.5, range_lr=0.5, batch=2, checks=10)
    tuned = tune(mlp, problems, samples, settings, fixed=fixed, key=jax.random.key(1))
    seen = [float(tuned.start_loss), *np.asarray(tuned.checked).tolist()]
    assert len(seen) == 11
    assert np.all(np.isfinite(seen))
    assert float(tuned.best_loss) == min(seen)
    assert int(tuned.best_step) == 3 * int(np.argmin(seen))


def test_a_start_that_nothing_beats_is_returned_as_it_was(rng):
    w, x = matrix(rng, K, N), activations(rng)
    start = quantize(w, UINT3)
    samples = Samples(x, x @ start.dequantize())
    tuned = tune(
        linear, {"w": Problem(w, start)}, samples, SHORT, key=jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, tuned.weights["w"], start)
    assert int(tuned.best_step) == 0
    assert float(tuned.best_loss) == float(tuned.start_loss)
    assert float(tuned.start_loss) < 1e-9


@pytest.mark.parametrize("compensated", [True, False], ids=["compensated", "original"])
def test_it_starts_from_codes_that_feed_errors_back(compensated, rng):
    """The first loss is the start's, whichever weight is given with it."""
    problems, samples = layer(rng)
    w, plain = problems["w"]
    moved = w + jnp.asarray(0.1 * rng.standard_normal(w.shape), jnp.float32)
    start = rtn(moved, None, UINT3, clip="mse")
    assert np.mean(np.asarray(start.codes != plain.codes)) > 0.3
    problem = Problem(moved if compensated else w, start)
    tuned = tune(linear, {"w": problem}, samples, SHORT, key=jax.random.key(0))
    before = loss(linear, {"w": start}, samples)
    assert float(tuned.start_loss) == pytest.approx(before, rel=1e-4)
    assert float(tuned.best_loss) < before


def test_held_samples_judge_and_are_not_learned_from(rng):
    """Their loss decides which iterate is kept; no step depends on them."""
    problems, samples = layer(rng)
    cut = lambda part: Samples(*(a if a is None else a[part] for a in samples))
    seen, held = cut(slice(2, None)), cut(slice(None, 2))
    # what the start answers: on this nothing can be better
    solved = held._replace(targets=held.inputs @ problems["w"].start.dequantize())
    run = lambda judge: tune(
        linear, problems, seen, SHORT, held=judge, key=jax.random.key(0)
    )
    plain, judged, kept = run(None), run(held), run(solved)
    np.testing.assert_allclose(plain.losses, judged.losses, rtol=1e-6)
    np.testing.assert_allclose(plain.losses, kept.losses, rtol=1e-6)
    start = {"w": problems["w"].start}
    assert float(judged.start_loss) == pytest.approx(
        loss(linear, start, held), rel=1e-4
    )
    expected = loss(linear, judged.weights, held)
    assert float(judged.best_loss) == pytest.approx(expected, rel=1e-4)
    assert float(judged.best_loss) < 0.95 * float(judged.start_loss)
    assert int(kept.best_step) == 0
    jax.tree.map(np.testing.assert_array_equal, kept.weights["w"], start["w"])


# ------------------------------------------------------------------------ what counts


def test_padding_does_not_count(rng):
    problems, samples = layer(rng)
    mask = jnp.asarray(rng.random(samples.targets.shape[:2]) < 0.7)
    inside = mask[..., None]
    clean = samples._replace(mask=mask.astype(jnp.float32))
    soiled = clean._replace(
        inputs=jnp.where(inside, clean.inputs, 50.0),
        targets=jnp.where(inside, clean.targets, -7.0),
    )
    one, other = (
        tune(linear, problems, s, SHORT, key=jax.random.key(0)) for s in (clean, soiled)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    start = {"w": problems["w"].start}
    expected = loss(linear, start, clean)
    assert float(one.start_loss) == pytest.approx(expected, rel=1e-4)


def test_outputs_of_different_sizes_count_alike(rng):
    problems, samples = layer(rng)
    big = 1000.0

    def both(weights, x):
        y = x @ weights["w"]
        return {"small": y[..., :8], "big": big * y[..., 8:]}

    targets = {"small": samples.targets[..., :8], "big": big * samples.targets[..., 8:]}
    tuned = tune(
        both,
        problems,
        samples._replace(targets=targets),
        PUBLISHED,
        key=jax.random.key(0),
    )
    start = problems["w"].start
    y, t = np.asarray(samples.inputs @ start.dequantize()), np.asarray(samples.targets)
    parts = [
        np.sum((y - t)[..., s] ** 2) / np.sum(t[..., s] ** 2)
        for s in (slice(0, 8), slice(8, None))
    ]
    assert float(tuned.start_loss) == pytest.approx(np.mean(parts), rel=1e-4)
    after = np.asarray(samples.inputs @ tuned.weights["w"].dequantize())
    for s in (slice(0, 8), slice(8, None)):
        assert np.sum((after - t)[..., s] ** 2) < 0.9 * np.sum((y - t)[..., s] ** 2)


# ------------------------------------------------------------------ one compilation


def test_a_second_block_of_the_same_shape_compiles_nothing(rng):
    traces = []

    def counted(weights, x):
        traces.append(1)
        return mlp(weights, x)

    def named(problems, prefix):
        return {
            name: p._replace(
                start=dataclasses.replace(p.start, name=f"{prefix}/{name}")
            )
            for name, p in problems.items()
        }

    problems, samples, fixed = block(rng)
    first = named(problems, "layers_0")
    tune(counted, first, samples, SHORT, fixed=fixed, key=jax.random.key(0))
    before = len(traces)
    assert before
    problems, samples, fixed = block(rng)
    second = named(problems, "layers_1")
    tuned = tune(counted, second, samples, SHORT, fixed=fixed, key=jax.random.key(1))
    assert len(traces) == before
    assert {q.name for q in tuned.weights.values()} == {"layers_1/up", "layers_1/down"}


def test_the_key_decides(rng):
    problems, samples = layer(rng)
    runs = [
        tune(linear, problems, samples, SHORT, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert not np.array_equal(runs[0].losses, runs[2].losses)


def test_every_batch_is_seen_before_any_is_seen_again(rng):
    """Each batch has its own error: the losses of the first round are all of them."""
    problems, samples = layer(rng)
    settings = Settings(steps=BATCHES, batch=1, lr=1e-9, ranges="fixed")
    tuned = tune(linear, problems, samples, settings, key=jax.random.key(3))
    y = np.asarray(samples.inputs @ problems["w"].start.dequantize())
    each = np.sum((y - np.asarray(samples.targets)) ** 2, (1, 2))
    each = each / np.mean(np.sum(np.asarray(samples.targets) ** 2, (1, 2)))
    np.testing.assert_allclose(np.sort(tuned.losses), np.sort(each), rtol=1e-3)
    assert not np.allclose(tuned.losses, each, rtol=1e-3)  # in another order


def test_a_batch_larger_than_all_is_all(rng):
    problems, samples = layer(rng)
    small, large = (
        tune(
            linear,
            problems,
            samples,
            dataclasses.replace(SHORT, batch=batch),
            key=jax.random.key(0),
        )
        for batch in (BATCHES, 100)
    )
    np.testing.assert_allclose(small.losses, large.losses, rtol=1e-5)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch": -1}, "batch=-1 must be at least 1"),
        ({"checks": 0}, "checks=0"),
        ({"lr": 0.0}, r"lr=0.0 must be a number in \(0, 1\]"),
        ({"lr": None}, "lr=None must be a number"),
        ({"range_lr": float("nan")}, "range_lr=nan"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        ({"ranges": True}, "ranges=True is not one of"),
    ],
)
def test_settings_that_could_tune_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_problems_that_do_not_fit_are_refused(rng):
    problems, samples = layer(rng)
    w, start = problems["w"]
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="problems is empty"):
        tune(linear, {}, samples, key=key)
    with pytest.raises(ValueError, match=r"'w' has shape \(48, 128\) and its start"):
        tune(linear, {"w": Problem(w.T, start)}, samples, key=key)
    with pytest.raises(ValueError, match=r"\['w'\] are both tuned and fixed"):
        tune(linear, problems, samples, fixed={"w": w}, key=key)
    with pytest.raises(ValueError, match=r"leading axes of \[7, 8\]"):
        tune(linear, problems, samples._replace(targets=samples.targets[:7]), key=key)
    with pytest.raises(ValueError, match=r"leading axes of \[0\]"):
        tune(
            linear, problems, Samples(samples.inputs[:0], samples.targets[:0]), key=key
        )
