"""The range of least error, against the optimal quantizers of known distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.observers import histogram_mse, minmax
from jaxq.observers.histogram import Histogram
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests.observers.small import see

BINS = 4096
# A normal sample of this many values reaches about 5.
WIDEST = 5.0


def normal(one_sided=False):
    """The histogram that N(0, 1), or its positive half, would give."""
    edges = np.linspace(-8, 8, BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = np.exp(-(middles**2) / 2) * (np.abs(middles) < WIDEST)
    mass *= (middles > 0) if one_sided else 1
    low = 0.0 if one_sided else -WIDEST
    return Histogram(
        jnp.asarray(1e6 * mass / mass.sum(), jnp.float32),
        jnp.float32(0),
        jnp.int32(3),
        jnp.float32(low),
        jnp.float32(WIDEST),
        jnp.int32(10**6),
    )


def normal_error(step, lowest, highest, one_sided=False):
    """The mean squared error of codes lowest … highest times step, on N(0, 1)."""
    x = np.linspace(0 if one_sided else -WIDEST, WIDEST, 20_001)
    density = np.exp(-(x**2) / 2)
    read = step * np.clip(np.round(x / step), lowest, highest)
    return np.sum(density * (x - read) ** 2) / np.sum(density)


def step_of(bounds, spec):
    low, high = (float(b) for b in bounds)
    if spec.symmetric:
        return max(-low, high) / spec.code_range[1]
    return (high - low) / (2**spec.bits - 1)


@pytest.mark.parametrize(
    ("bits", "step"),
    # The optimal steps of 2^b - 1 levels; that of 4 bits is a published figure.
    [(2, None), (3, None), (4, 0.3534), (8, None)],
)
def test_the_range_of_a_normal_distribution_is_optimal(bits, step):
    spec = QuantSpec(f"int{bits}", "tensor")
    found = step_of(histogram_mse().bounds(normal(), spec), spec)
    highest = 2 ** (bits - 1) - 1
    error = normal_error(found, -highest, highest)
    steps = 2.5 / highest * np.linspace(0.5, 2, 100)
    best = min(normal_error(s, -highest, highest) for s in steps)
    assert error < best * 1.005
    if step:
        assert found == pytest.approx(step, rel=0.02)
        assert error == pytest.approx(0.012889, rel=0.005)


def test_all_codes_of_an_asymmetric_range_are_used():
    spec = QuantSpec("uint4", "tensor", symmetric=False)
    found = step_of(histogram_mse().bounds(normal(), spec), spec)
    # 16 levels, zero among them: a step of 0.3386 and this error
    assert normal_error(found, -8, 7) == pytest.approx(0.011864, rel=0.01)
    found = step_of(histogram_mse().bounds(normal(one_sided=True), spec), spec)
    best = min(normal_error(s, 0, 15, True) for s in np.linspace(0.1, 0.3, 200))
    assert normal_error(found, 0, 15, True) < best * 1.01


def test_the_ends_of_a_skewed_range_move_apart(rng):
    # No outliers below zero: whoever shrinks both ends alike loses that half.
    x = rng.uniform(-1, 1, (1000, 8)).astype(np.float32)
    x[0, :4] = rng.uniform(6, 10, 4)
    spec = QuantSpec("uint3", "tensor", symmetric=False)
    observer = histogram_mse()
    low, high = observer.bounds(see(observer, x), spec)

    def error(low, high):
        step = (high - low) / 7
        zero = np.clip(np.round(-low / step), 0, 7)
        read = (np.clip(np.round(x / step) + zero, 0, 7) - zero) * step
        return np.mean((x - read) ** 2)

    lows, highs = np.linspace(-1, 0, 21), np.linspace(1, 10, 91)
    best = min(error(a, b) for a in lows for b in highs)
    assert error(float(low), float(high)) < 1.02 * best
    both = np.linspace(0.01, 1, 100)
    assert best < 0.9 * min(error(-p, p * x.max()) for p in both)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("nf4", "tensor"),
        QuantSpec("fp4_e2m1", "tensor", scale="e8m0"),
    ],
    ids=QuantSpec.describe,
)
def test_no_format_loses_by_it(spec, rng):
    x = jnp.asarray(rng.standard_t(3, (1000, 16)), jnp.float32)

    @jax.jit
    def error(low, high):
        largest = jnp.maximum(-low, high)[None, None]
        read = quantize(x, spec, bounds=(-largest, largest)).dequantize()
        return jnp.mean((read - x) ** 2)

    best = error(*histogram_mse().bounds(see(histogram_mse(), x), spec))
    assert best < 0.9 * error(*minmax().bounds(see(minmax(), x), spec))


def test_the_exponent_weighs_large_errors():
    spec = QuantSpec("int3", "tensor")
    _, gentle = histogram_mse(exponent=1.0).bounds(normal(), spec)
    _, square = histogram_mse().bounds(normal(), spec)
    _, strict = histogram_mse(exponent=4.0).bounds(normal(), spec)
    assert gentle < square < strict
    with pytest.raises(ValueError, match="exponent=0 must be positive"):
        histogram_mse(exponent=0)
