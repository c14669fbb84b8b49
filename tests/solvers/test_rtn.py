"""Clipping: ranges against brute force in NumPy, and the best uniform quantizers."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.formats.codebook import NF4
from jaxq.names import UnknownNameError
from jaxq.quantize import quantize
from jaxq.solvers import rtn
from jaxq.spec import QuantSpec
from tests import oracle

K, N, GROUP = 80, 6, 32  # two whole groups and a ragged one
GPTQ_GRID = [1 - i / 100 for i in range(80)]


@pytest.fixture
def weight(rng):
    """Heavy tails, one dead column, one column off centre."""
    w = rng.standard_t(3, (K, N)).astype(np.float32)
    w[:, 1] = 0
    w[:, 2] += 4
    return w


def blocks(w):
    """Every (column, group) as a vector of float64, with its place in the scales."""
    for g in range(math.ceil(w.shape[0] / GROUP)):
        for n in range(w.shape[1]):
            yield (g, n), w[g * GROUP : (g + 1) * GROUP, n].astype(np.float64)


def restricted_int4(x, low, high):
    scale = np.float64(np.float32(max(abs(low), abs(high))) / np.float32(7))
    return np.clip(np.rint(x / scale), -7, 7) * scale if scale else 0 * x


def asymmetric_uint3_bf16(x, low, high):
    low, high = min(low, 0), max(high, 0)
    scale = float(ml_dtypes.bfloat16((high - low) / 7))
    if not scale:
        return 0 * x
    zero = np.clip(np.rint(-low / scale), 0, 7)
    return (np.clip(np.rint(x / scale) + zero, 0, 7) - zero) * scale


def nf4(x, low, high):
    scale = max(abs(low), abs(high))
    table = np.asarray(NF4)
    nearest = np.abs(x[:, None] / (scale or 1) - table).argmin(1)
    return table[nearest] * scale


QUANTIZERS = {
    "int4": (QuantSpec("int4", GROUP), restricted_int4),
    "uint3": (
        QuantSpec("uint3", GROUP, False, scale="bfloat16"),
        asymmetric_uint3_bf16,
    ),
    "nf4": (QuantSpec("nf4", GROUP), nf4),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_mse_range_is_the_best_of_its_grid_in_every_block(name, weight):
    spec, quantizer = QUANTIZERS[name]
    got = oracle.dequantize(rtn(jnp.asarray(weight), None, spec, clip="mse"))
    clipped = 0
    for (g, n), x in blocks(weight):
        losses = [
            np.sum(np.abs(x - quantizer(x, x.min() * p, x.max() * p)) ** 2.4)
            for p in GPTQ_GRID
        ]
        mine = np.sum(np.abs(x - got[g * GROUP : (g + 1) * GROUP, n]) ** 2.4)
        # ranges so close that float32 cannot tell them apart are as good
        assert mine == pytest.approx(min(losses), rel=1e-4, abs=1e-9), (g, n)
        clipped += mine < losses[0] * 0.99
    assert clipped >= 5  # clipping was worth it somewhere


@pytest.mark.parametrize("name", QUANTIZERS)
def test_absmax_is_plain_rounding(name, weight):
    spec, quantizer = QUANTIZERS[name]
    q = rtn(jnp.asarray(weight), None, spec)
    got = oracle.dequantize(q)
    for (g, n), x in blocks(weight):
        expected = quantizer(x, x.min(), x.max())
        mine = got[g * GROUP : (g + 1) * GROUP, n]
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, q, quantize(jnp.asarray(weight), spec))


@pytest.mark.parametrize("percent", [99.9, 90.0, 100.0])
def test_percentiles_are_numpys(percent, weight):
    spec = QuantSpec("int8", GROUP)
    q = rtn(jnp.asarray(weight), None, spec, clip="percentile", percent=percent)
    scales = np.asarray(q.scales)
    for place, x in blocks(weight):
        cuts = np.quantile(x, [1 - percent / 100, percent / 100])
        expected = np.abs(cuts).max() / 127
        assert scales[place] == pytest.approx(expected, rel=1e-5), place


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int2", GROUP),
        QuantSpec("uint4", GROUP, False, scale="float16"),
        QuantSpec("fp4_e2m1", GROUP, scale="e8m0"),
        QuantSpec("dynamic8", (16, 2), scale="e4m3"),
    ],
    ids=lambda s: s.describe(),
)
def test_clipping_by_mse_is_never_worse_in_its_own_norm(spec, weight):
    x, exponent = jnp.asarray(weight), 1.5
    options = {"clip": "mse", "exponent": exponent, "steps": 12}
    plain, clipped = rtn(x, None, spec), rtn(x, None, spec, **options)
    grid = plain.scales.shape
    rows, cols = np.arange(K) // plain.block[0], np.arange(N) // plain.block[1]

    def loss(q):
        error = np.abs(oracle.dequantize(q) - weight) ** exponent
        total = np.zeros(grid)
        np.add.at(total, np.ix_(np.minimum(rows, grid[0] - 1), cols), error)
        return total

    assert np.all(loss(clipped) <= loss(plain) * (1 + 1e-4) + 1e-9)


# ------------------------------------------- the best uniform quantizer of a Gaussian


def gaussian_loss(steps, lowest, highest):
    """``E (x − x̂)²`` of levels ``lowest … highest`` times each step, exact."""
    cdf = np.vectorize(NormalDist().cdf)
    pdf = np.vectorize(NormalDist().pdf)
    total = np.zeros_like(steps)
    for k in range(lowest, highest + 1):
        a = np.where(k == lowest, -40.0, (k - 0.5) * steps)
        b = np.where(k == highest, 40.0, (k + 0.5) * steps)
        mass, level = cdf(b) - cdf(a), k * steps
        first = pdf(a) - pdf(b)
        second = mass + a * pdf(a) - b * pdf(b)
        total += second - 2 * level * first + level**2 * mass
    return total


def best_step(lowest, highest):
    steps = np.linspace(0.05, 1.6, 1551)
    losses = gaussian_loss(steps, lowest, highest)
    return steps[losses.argmin()], losses.min()


@pytest.fixture(scope="module")
def gaussian():
    """A sample without noise: the quantiles of N(0, 1)."""
    n = 1 << 14
    return np.asarray(
        [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)], np.float32
    )


def test_the_exact_integrals_agree_with_the_published_figures():
    step, loss = best_step(-7, 7)
    assert (step, 7 * step, loss) == pytest.approx((0.3534, 2.474, 0.012889), rel=2e-3)
    assert best_step(-8, 7) == pytest.approx((0.3386, 0.011864), rel=2e-3)


@pytest.mark.parametrize(
    ("spec", "lowest", "highest"),
    [
        (QuantSpec("int4", "tensor"), -7, 7),
        (QuantSpec("int5", "tensor"), -15, 15),
        (QuantSpec("int4", "tensor", grid="full"), -8, 7),
        (QuantSpec("int4", "tensor", grid="gptq"), -8, 7),
        (QuantSpec("uint4", "tensor", False), -8, 7),
    ],
    ids=lambda v: v.describe() if isinstance(v, QuantSpec) else None,
)
def test_clipping_finds_the_best_quantizer_of_a_gaussian(
    spec, lowest, highest, gaussian
):
    q = rtn(jnp.asarray(gaussian), None, spec, clip="mse", exponent=2.0, steps=400)
    step, loss = best_step(lowest, highest)
    assert float(q.scales[0]) == pytest.approx(step, rel=0.015)
    mean_square = np.mean((oracle.dequantize(q) - gaussian) ** 2)
    assert mean_square == pytest.approx(loss, rel=0.01)


def test_a_percentile_of_a_gaussian(gaussian):
    spec = QuantSpec("int8", "tensor")
    q = rtn(jnp.asarray(gaussian), None, spec, clip="percentile", percent=99.9)
    assert float(q.scales[0]) * 127 == pytest.approx(3.0902, rel=0.01)


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "msee"}, "clipping method 'msee'; did you mean 'mse'"),
        ({"clip": "mse", "step": 3}, "clip='mse': 'step'; did you mean 'steps'"),
        ({"clip": "absmax", "percent": 99}, "clip='absmax': 'percent'. Known: none"),
        ({"percent": 99}, "'percent'"),
    ],
)
def test_an_unknown_option_is_refused(options, message, weight):
    with pytest.raises(UnknownNameError, match=message):
        rtn(jnp.asarray(weight), None, QuantSpec("int4"), **options)


@pytest.mark.parametrize("percent", [50, 100.1, -1, float("nan")])
def test_a_percentile_out_of_range_is_refused(percent, weight):
    with pytest.raises(ValueError, match=r"percent=.* must lie in \(50, 100\]"):
        rtn(
            jnp.asarray(weight),
            None,
            QuantSpec("int4"),
            clip="percentile",
            percent=percent,
        )


def test_a_centered_spec_is_not_clipped_without_a_word(weight):
    with pytest.raises(ValueError, match=r"clip='mse'.*center=True"):
        rtn(jnp.asarray(weight), None, QuantSpec("int8", center=True), clip="mse")
