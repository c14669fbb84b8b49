"""Histograms: their counts, and the quantiles read off them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.observers import percentile
from jaxq.spec import QuantSpec
from tests.observers.small import find, see

BINS = 256
INT8 = QuantSpec("int8", "tensor")


def counted(x, exponent):
    edges = np.linspace(-(2.0**exponent), 2.0**exponent, BINS + 1)
    # np.histogram closes the last bin on both sides; ours is open
    assert x.max() < edges[-1]
    return np.histogram(x[x != 0], edges)[0]


def test_counts_are_numpys_on_the_next_power_of_two(rng):
    x = rng.standard_normal((100, 7)).astype(np.float32)
    x[0, :3] = 0, 4.0, -4.0  # a power of two needs the next range
    x[1, :3] = 0.03125, -0.03125, 1.5  # edges belong to the bin above
    state = see(percentile(bins=BINS), np.clip(x, -4, 4))
    assert state.exponent == 3
    assert state.bin_width == 2 * 2.0**3 / BINS
    np.testing.assert_array_equal(state.counts, counted(np.clip(x, -4, 4), 3))
    assert state.zeros == 1
    assert state.counts.sum() + state.zeros == x.size


@pytest.mark.parametrize("growth", [1e-3, 1.0, 3.0, 1e3, 1e30])
def test_the_range_grows_without_losing_a_count(growth, rng):
    x = rng.standard_normal((2, 50, 8)).astype(np.float32)
    x[1] *= np.float32(growth)
    both = see(percentile(bins=BINS), x.reshape(100, 8))
    for order in (x, x[::-1]):
        jax.tree.map(
            np.testing.assert_array_equal, see(percentile(bins=BINS), *order), both
        )
    np.testing.assert_array_equal(both.counts, counted(x, int(both.exponent)))


def test_the_range_holds_the_extremes_of_float32():
    largest = float(jnp.finfo(jnp.float32).max)
    state = see(percentile(bins=BINS), jnp.asarray([[largest, -largest, 1.0, -1.0]]))
    assert state.exponent == 128
    assert np.flatnonzero(state.counts).tolist() == [0, 127, 128, 255]


def test_many_equal_values_are_all_counted():
    x = jnp.ones((2**12, 2**12 + 1))  # more than float32 counts one by one
    assert see(percentile(bins=BINS), x).counts.max() == 2**24 + 2**12


@pytest.mark.parametrize("percent", [60.0, 99.9, 100.0])
def test_quantiles_are_numpys_to_a_bin(percent, rng):
    x = rng.gamma(2.0, size=(1000, 20)).astype(np.float32) - 1
    x[x < -0.9] = 0
    observer = percentile(percent, bins=2048)
    state = see(observer, x)
    low, high = find(observer, state, INT8)
    expected = np.quantile(x, [1 - percent / 100, percent / 100])
    np.testing.assert_allclose((low, high), expected, atol=float(state.bin_width))
    if percent == 100:
        assert (low, high) == (x.min(), x.max())


def test_exact_zeros_have_a_share():
    # Nine of ten are zero: so are all quantiles but the outermost.
    x = jnp.zeros((10, 10)).at[:, 0].set(jnp.linspace(-1.0, 1.0, 10))
    for percent, expected in ((90.0, (0, 0)), (98.5, (-7 / 9, 7 / 9))):
        observer = percentile(percent, bins=2048)
        found = find(observer, see(observer, x), INT8)
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("percent", [50, 100.1, -1])
def test_a_percent_out_of_range_is_refused(percent):
    with pytest.raises(ValueError, match=rf"percent={percent} must lie in \(50, 100\]"):
        percentile(percent)


@pytest.mark.parametrize("bins", [32, 1000, 16384, 0, -4])
def test_bins_that_do_not_join_in_pairs_are_refused(bins):
    with pytest.raises(ValueError, match=rf"bins={bins} must be a power of two"):
        percentile(bins=bins)
