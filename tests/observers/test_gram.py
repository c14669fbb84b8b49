"""Sums over tokens, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.observers import channel_absmax, cross_gram, gram, magnitude
from tests.observers.small import see

# n float32 additions of terms of one sign are off by n/2 ulp at the very most.
EXACT = 64 * 2.0**-24


def test_the_gram_is_numpys(rng):
    x = np.abs(rng.standard_normal((4, 16, 7))).astype(np.float32)
    wide = x.astype(np.float64).reshape(-1, 7)
    state = see(gram(), *x)
    np.testing.assert_allclose(state.total, wide.T @ wide, rtol=EXACT)
    np.testing.assert_array_equal(state.total, state.total.T)
    assert state.tokens == 64


@pytest.mark.parametrize("width", [511, 512, 1031])
def test_wide_grams_are_whole_although_one_half_is_summed(rng, width):
    x = np.abs(rng.standard_normal((64, width))).astype(np.float32)
    wide = x.astype(np.float64)
    total = see(gram(), x).total
    np.testing.assert_allclose(total, wide.T @ wide, rtol=EXACT)
    np.testing.assert_array_equal(total, total.T)


def test_the_gram_keeps_small_channels_beside_large_ones(rng):
    x = rng.standard_normal((64, 3)).astype(np.float32) * [1e3, 1.0, 1e-3]
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    norms = np.linalg.norm(wide, axis=0)
    error = np.abs(see(gram(), x).total - wide.T @ wide)
    assert np.max(error / np.outer(norms, norms)) < EXACT


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_products_of_narrow_inputs_are_wide(dtype):
    x = jnp.full((1024, 2), 257.0).astype(dtype)  # whose square is no bfloat16 either
    expected = 1024 * float(x[0, 0]) ** 2
    for found in (see(gram(), x).total, cross_gram(2 * x, x)):
        np.testing.assert_allclose(found, expected, rtol=1024 * 2.0**-24)


def test_magnitudes_are_numpys(rng):
    x = rng.standard_normal((4, 16, 7)).astype(np.float32)
    wide = np.abs(x.astype(np.float64)).reshape(-1, 7)
    np.testing.assert_allclose(see(magnitude(), *x).total, wide.sum(axis=0), rtol=EXACT)
    np.testing.assert_allclose(see(magnitude(), *x).mean, wide.mean(axis=0), rtol=EXACT)
    np.testing.assert_array_equal(see(channel_absmax(), *x).largest, wide.max(axis=0))
    empty = magnitude().init(x)
    assert empty.mean.tolist() == [0.0] * 7


def test_the_mean_of_stacked_states_is_each_ones():
    x = jnp.asarray([[[2.0, 4.0]], [[6.0, 8.0]]])
    observer = magnitude()
    stacked = jax.vmap(lambda x: observer.update(observer.init(x), x))(x)
    assert stacked.mean.tolist() == [[2.0, 4.0], [6.0, 8.0]]


def test_the_drift_is_numpys(rng):
    x, ahead = rng.standard_normal((2, 3, 8, 5)).astype(np.float32)
    mask = rng.random((3, 8)) < 0.5
    rows, far = (a.astype(np.float64)[mask] for a in (x, ahead))
    spoiled = np.where(mask[..., None], ahead, np.nan)
    found = cross_gram(jnp.asarray(spoiled), jnp.asarray(x), jnp.asarray(mask))
    np.testing.assert_allclose(found, (far - rows).T @ rows, atol=1e-5)
    assert not np.any(cross_gram(jnp.asarray(x), jnp.asarray(x)))


def test_the_drift_needs_the_same_tokens():
    with pytest.raises(ValueError, match=r"\(2, 3\) and x \(1, 3\)"):
        cross_gram(jnp.ones((2, 3)), jnp.ones((1, 3)))
