"""AWQ: the equations of the official code and of AutoAWQ, and what they gain."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from jaxq.transforms import TRANSFORMS, awq
from jaxq.transforms.awq import relative_magnitude
from tests.transforms.problem import mse, problem


def normalized(s):
    s = np.maximum(s, 1e-4)
    return s / np.sqrt(s.max() * s.min())


def candidates(case, **options):
    seen = case.statistics(TRANSFORMS["awq"])
    run = jax.jit(lambda weights, *seen: awq(weights, *seen, 16, **options))
    return np.asarray(run(case.arrays, *seen))


def test_the_equation(rng):
    case = problem(rng)
    mean = np.abs(case.x).mean(0)
    got = candidates(case)
    assert got.shape == (20, 48)
    assert (got[0] == 1).all()
    for i, s in enumerate(got):
        np.testing.assert_allclose(s, normalized(mean ** (i / 20)), rtol=1e-4)


def test_the_equation_with_the_weights(rng):
    """As AutoAWQ computes it: weights of all consumers, group by group."""
    case = problem(rng)
    every = np.concatenate([w.T for w in case.weights])
    groups = np.abs(every).reshape(-1, 16)
    w = groups / (groups.max(1, keepdims=True) + 1e-6)
    w = w.reshape(every.shape).mean(0)
    np.testing.assert_allclose(relative_magnitude(case.arrays, 16), w, rtol=1e-5)
    mean, got = np.abs(case.x).mean(0), candidates(case, duo=True, points=4)
    assert got.shape == (5, 48)
    assert (got[0] == 1).all()
    for r, s in zip((0, 0.25, 0.5, 0.75), got[1:], strict=True):
        want = normalized(mean**r / (w ** (1 - r) + 1e-4))
        np.testing.assert_allclose(s, want, rtol=1e-4)


def test_both_is_both(rng):
    case = problem(rng)
    both = candidates(case, duo="both", points=4)
    alone = candidates(case, points=4), candidates(case, duo=True, points=4)
    np.testing.assert_allclose(both, np.concatenate([alone[0], alone[1][1:]]))


def test_groups_that_do_not_divide(rng):
    w = rng.standard_normal((10, 3)).astype(np.float32)
    got = relative_magnitude([jnp.asarray(w)], 4)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        size = np.abs(w[rows])
        want = (size / (size.max(0) + 1e-6)).mean(1)
        np.testing.assert_allclose(got[rows], want, rtol=1e-5)
    whole = relative_magnitude([jnp.asarray(w)], None)
    want = (np.abs(w) / (np.abs(w).max(0) + 1e-6)).mean(1)
    np.testing.assert_allclose(whole, want, rtol=1e-5)


def test_the_range_is_centred_on_one(rng):
    got = candidates(problem(rng, spread=2.0))
    np.testing.assert_allclose(got.max(1) * got.min(1), 1, rtol=1e-5)


def test_the_best_scale_beats_keeping_outliers_in_float(rng):
    """Log-normal activations, 3 bits in groups of 128. The source of the figures has a
    best MSE of 0.678 of RTN's at α = 0.30, and 0.79 with the top 1 % of channels in
    float; its generator is not known, so these are ranges."""
    case = problem(rng, inner=256, outputs=(128,), tokens=256)
    x, w = case.x, case.weights[0]
    spec, want = QuantSpec("uint3", 128, symmetric=False), case.x @ w

    @jax.jit
    @jax.vmap
    def rounded(s):
        w = case.arrays[0] * s[:, None]
        return quantize(w, spec, 0).dequantize() / s[:, None]

    found = candidates(case)
    errors = [mse(x @ np.asarray(q, np.float64), want) for q in rounded(found)]
    ratios = np.asarray(errors) / errors[0]
    best = int(np.argmin(ratios))
    assert 0.2 <= best / 20 <= 0.45
    assert 0.55 < ratios[best] < 0.78
    assert ratios[-1] > 1.2
    kept = np.asarray(rounded(found[:1])[0], np.float64)
    salient = np.argsort(np.abs(x).mean(0))[-2:]
    kept[salient] = w[salient]
    assert 0.6 < mse(x @ kept, want) / errors[0] < 0.9
