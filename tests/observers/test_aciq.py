"""ACIQ's clips, against its equations minimized numerically."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.observers import aciq
from jaxq.observers.aciq import GAUSSIAN_CLIP, LAPLACE_CLIP
from jaxq.spec import QuantSpec
from tests.observers.small import find, see

# α/σ and α/B for 1 … 8 bits as the authors' code has them, minimized on a coarse grid.
PUBLISHED = {
    "gaussian": (1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),
    "laplace": (1.86, 2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89),
}


def gaussian_error(clip, bits):
    tail = 0.5 * math.erfc(clip / math.sqrt(2))
    density = math.exp(-(clip**2) / 2) / math.sqrt(2 * math.pi)
    return 2 * ((clip**2 + 1) * tail - clip * density) + clip**2 / (3 * 4**bits)


def laplace_error(clip, bits):
    return 2 * math.exp(-clip) + clip**2 / (3 * 4**bits)


def minimum(error, bits):
    """Golden-section search: both errors have one minimum."""
    low, high = 0.1, 20.0
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a, bits) < error(b, bits) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("bits", range(1, 10))
def test_the_tables_minimize_the_equations(bits):
    # a minimum is known to the square root of the precision of its value
    gaussian, laplace = minimum(gaussian_error, bits), minimum(laplace_error, bits)
    assert GAUSSIAN_CLIP[bits - 1] == pytest.approx(gaussian, rel=1e-6)
    assert LAPLACE_CLIP[bits - 1] == pytest.approx(laplace, rel=1e-6)
    if bits <= 8:
        assert gaussian == pytest.approx(PUBLISHED["gaussian"][bits - 1], abs=0.01)
        assert laplace == pytest.approx(PUBLISHED["laplace"][bits - 1], abs=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", ["gaussian", "laplace"])
def test_the_clip_is_that_of_the_distribution(bits, family, rng):
    draw = rng.normal if family == "gaussian" else rng.laplace
    x = draw(scale=3.0, size=(2000, 50)).astype(np.float32)
    state = see(aciq(), *x.reshape(4, 500, 50))
    assert bool(state.is_laplace) == (family == "laplace")
    low, high = find(aciq(), state, QuantSpec(f"int{bits}", "tensor"))
    clip = 3 * PUBLISHED[family][bits - 1]
    # 1e5 samples: σ to 0.3 %, B to 0.3 %
    expected = max(-clip, x.min()), min(clip, x.max())
    np.testing.assert_allclose((low, high), expected, rtol=0.015)


def test_half_a_distribution_has_one_bit_more(rng):
    x = np.maximum(rng.normal(size=(2000, 50)), 0).astype(np.float32)
    state = see(aciq(), x)
    assert int(state.nonzero) == np.sum(x > 0)
    for spec, clip in (
        (QuantSpec("uint4", "tensor"), 2.936),
        (QuantSpec("uint4", "tensor", symmetric=False), 2.936),
        (QuantSpec("int4", "tensor"), 2.559),  # half of the codes are below zero
    ):
        low, high = find(aciq(), state, spec)
        assert low == 0
        assert high == pytest.approx(clip, rel=0.015)


def test_moments_are_numpys(rng):
    x = rng.normal(size=(100, 10)).astype(np.float32)
    x[0] = 0
    state, wide = see(aciq(), x), x.astype(np.float64)
    np.testing.assert_allclose(state.square, np.sum(wide**2), rtol=1e-6)
    np.testing.assert_allclose(state.magnitude, np.sum(np.abs(wide)), rtol=1e-6)
    np.testing.assert_allclose(state.deviation, np.sqrt(np.mean(wide[1:] ** 2)), 1e-6)
    np.testing.assert_allclose(state.breadth, np.mean(np.abs(wide[1:])), rtol=1e-6)


def test_zeros_alone_have_an_empty_range():
    low, high = find(aciq(), see(aciq(), jnp.zeros((2, 2))), QuantSpec("int4"))
    assert (low, high) == (0, 0)


def test_codes_that_are_not_even_are_refused():
    with pytest.raises(ValueError, match=r"aciq assumes evenly spaced.*'fp8_e4m3'"):
        aciq().bounds(see(aciq(), jnp.ones((1, 1))), QuantSpec("fp8_e4m3", "tensor"))
