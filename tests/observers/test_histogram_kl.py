"""The range of least divergence, against its description in plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.observers import histogram_kl
from jaxq.observers.histogram_kl import kl_curve
from jaxq.spec import QuantSpec
from tests.observers.small import find, see

INT4 = QuantSpec("int4", "tensor")
UINT4 = QuantSpec("uint4", "tensor", symmetric=False)


def smoothed(p, epsilon=1e-4):
    empty, full = np.sum(p == 0), np.sum(p != 0)
    return np.where(p == 0, epsilon, np.maximum(p - epsilon * empty / full, epsilon))


def divergence(counts, first, last, levels):
    """KL(P ‖ Q) for the threshold that keeps the bins first … last - 1."""
    kept = counts[first:last]
    p = kept.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.zeros_like(p)
    for level in range(levels):
        members = [
            i for i in range(len(kept)) if (i + 0.5) / len(kept) * levels // 1 == level
        ]
        occupied = [i for i in members if p[i] > 0]
        for i in occupied:
            q[i] = kept[members].sum() / len(occupied)
    if not q.any():
        return np.inf
    p, q = smoothed(p), smoothed(q)
    p, q = p / p.sum(), q / q.sum()
    return np.sum(p * np.log(p / q))


def brute_force(state, bits, one_sided):
    counts = np.asarray(state.counts, np.float64)
    half = len(counts) // 2
    curve = []
    for threshold in range(2 ** (bits - 1), half + 1):
        first = half if one_sided else half - threshold
        levels = 2**bits if one_sided else 2**bits - 1
        short = half + threshold - first < levels
        value = divergence(counts, first, half + threshold, levels)
        curve.append(np.inf if short else value)
    return np.array(curve)


def draw(kind, rng):
    x = rng.laplace(size=(300, 20)) if kind == "laplace" else rng.normal(size=(300, 20))
    if kind == "outliers":
        x[:3] *= 6
    return jnp.asarray(np.maximum(x, 0) if kind == "relu" else x, jnp.float32)


@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers", "relu"])
@pytest.mark.parametrize("spec", [INT4, UINT4], ids=["symmetric", "asymmetric"])
def test_the_divergence_is_that_of_the_description(kind, spec, rng):
    observer = histogram_kl(bins=128)
    state = see(observer, draw(kind, rng))
    one_sided = kind == "relu" and not spec.symmetric
    expected = brute_force(state, 4, one_sided)
    thresholds, curve = jax.jit(kl_curve, static_argnums=1)(state, spec)
    np.testing.assert_allclose(curve, expected, rtol=1e-4, atol=1e-6)
    clip = int(thresholds[np.argmin(expected)]) * float(state.bin_width)
    low, high = find(observer, state, spec)
    assert (low, high) == (max(-clip, state.low), min(clip, state.high))


def test_the_last_bin_is_not_left_out():
    # All mass of the outermost level lies in the bin that a stop index of -1 skips.
    counts = np.full(128, 1.0, np.float32)
    counts[127] = counts[0] = 500.0
    observer = histogram_kl(bins=128)
    state = observer.init(jax.ShapeDtypeStruct((1, 1), jnp.float32))._replace(
        counts=jnp.asarray(counts),
        exponent=jnp.int32(0),
        low=jnp.float32(-0.999),
        high=jnp.float32(0.999),
        tokens=jnp.int32(1000),
    )
    _, high = observer.bounds(state, INT4)
    assert high == state.high


def test_outliers_are_clipped_and_the_bulk_is_not(rng):
    x = draw("normal", rng).at[0, 0].set(30.0)
    observer = histogram_kl()
    _, high = find(observer, see(observer, x), QuantSpec("int8", "tensor"))
    assert 2.5 < high < 5


def test_codes_that_are_not_even_or_too_many_are_refused(rng):
    observer = histogram_kl(bins=256)
    state = see(observer, draw("normal", rng))
    bounds = functools.partial(observer.bounds, state)
    with pytest.raises(ValueError, match=r"256 bins are too few for 'int8'.*>= 512"):
        bounds(QuantSpec("int8", "tensor"))
    with pytest.raises(ValueError, match="'nf4' are not: use histogram_mse"):
        bounds(QuantSpec("nf4", "tensor"))
