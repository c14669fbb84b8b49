"""Relaxed weights: exact at the start, in between a hand-written NumPy gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats.codebook import NF4
from jaxq.quantize import quantize
from jaxq.solvers import rtn
from jaxq.solvers.relaxation import Variables, anchored, neutral, relaxed, settled
from jaxq.spec import QuantSpec
from tests import oracle

K, N, GROUP = 40, 6, 16  # two whole groups and a ragged one

FREE = [
    QuantSpec("uint4", GROUP, False, scale="bfloat16"),
    QuantSpec("uint2", GROUP, False),
    QuantSpec("int3", GROUP, False, scale="e4m3"),
    QuantSpec("int2", GROUP),
    QuantSpec("int3", "channel", grid="gptq", scale="float16"),
    QuantSpec("int4", "tensor", grid="full", scale="bfloat16"),
    QuantSpec("nf4", GROUP, scale="bfloat16"),
    QuantSpec("fp4_e2m1", (GROUP, 2)),
    QuantSpec("fp8_e4m3", "channel"),
]
FIXED = [
    QuantSpec("fp4_e2m1", GROUP, scale="e8m0"),
    QuantSpec("nf4", GROUP, scale=QuantSpec("dynamic8", 8, center=True)),
    QuantSpec("fp4_e2m1", GROUP, scale=QuantSpec("fp8_e4m3", "tensor")),
]
SPECS = {spec.describe(): spec for spec in FREE + FIXED}


@pytest.fixture
def weight(rng):
    """Heavy tails, one dead column, one column off centre."""
    w = rng.standard_t(3, (K, N)).astype(np.float32)
    w[:, 1] = 0
    w[:, 2] += 4
    return jnp.asarray(w)


RANGES = ("scale", "ends", "fixed")


def moved(start, rng, ranges="ends", size=0.4):
    """Variables somewhere else, those that are fixed left out."""

    def noise(x, around):
        if x is None:
            return None
        return jnp.asarray(around + rng.uniform(-size, size, x.shape), jnp.float32)

    rounding, *factors = neutral(start, ranges)
    return Variables(noise(rounding, 0), *(noise(x, 0.9) for x in factors))


@pytest.mark.parametrize("ranges", ["scale", "ends"])
@pytest.mark.parametrize("name", SPECS)
def test_where_it_starts_it_is_the_start(name, ranges, weight):
    start = rtn(weight, None, SPECS[name], clip="mse")
    anchor = anchored(weight, start)
    np.testing.assert_array_equal(anchor, weight)  # rounding it gives the start
    at = neutral(start, ranges)
    jax.tree.map(np.testing.assert_array_equal, settled(anchor, start, at), start)
    got = jax.jit(relaxed)(anchor, start, at)
    np.testing.assert_array_equal(got, start.dequantize())


@pytest.mark.parametrize("name", SPECS)
def test_codes_that_nothing_rounds_to_are_kept(name, weight, rng):
    """What error feedback chose, seen from the original weight."""
    noise = jnp.asarray(rng.standard_normal((K, N)), jnp.float32)
    start = quantize(weight + noise, SPECS[name])
    anchor = anchored(weight, start)
    assert 0 < np.mean(np.asarray(anchor != weight)) < 1
    at = neutral(start)
    jax.tree.map(np.testing.assert_array_equal, settled(anchor, start, at), start)
    np.testing.assert_array_equal(relaxed(anchor, start, at), start.dequantize())


@pytest.mark.parametrize("ranges", ["scale", "ends"])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_optimized_is_what_is_stored(name, ranges, weight, rng):
    start = quantize(weight, SPECS[name])
    at = moved(start, rng, ranges)
    q = jax.jit(settled)(weight, start, at)
    np.testing.assert_array_equal(relaxed(weight, start, at), q.dequantize())
    assert jax.tree.structure(q) == jax.tree.structure(start)
    changed = np.mean(np.asarray(q.dequantize() != start.dequantize()))
    assert changed > 0.1


def test_offsets_and_input_scales_belong_to_the_weight(weight, rng):
    plain = quantize(weight, QuantSpec("uint3", GROUP, False))
    start = dataclasses.replace(
        plain,
        offset=jnp.full((1, 1), 0.3, jnp.float32),
        input_scale=jnp.asarray(rng.uniform(0.5, 2, (K, 1)), jnp.float32),
    )
    at = moved(start, rng)
    q = settled(weight, start, at)
    np.testing.assert_array_equal(relaxed(weight, start, at), q.dequantize())
    np.testing.assert_allclose(
        relaxed(weight, start, at), oracle.dequantize(q), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("spec", FIXED, ids=lambda s: s.describe())
def test_scales_that_cannot_move_a_little_are_fixed(spec, weight):
    start = quantize(weight, spec)
    for ranges in RANGES:
        assert neutral(start, ranges)[1:] == (None, None, None)


@pytest.mark.parametrize(
    ("ranges", "learned"),
    [("scale", {"scale"}), ("ends", {"low", "high"}), ("fixed", set())],
)
def test_what_is_learned_of_a_range(ranges, learned, weight):
    at = neutral(quantize(weight, FREE[0]), ranges)._asdict()
    assert {n for n, x in at.items() if x is not None} == {"rounding", *learned}


@pytest.mark.parametrize("spec", FREE, ids=lambda s: s.describe())
def test_a_scale_that_moves_leaves_codes_as_they_are_and_ends_do_not(spec, weight, rng):
    """Codes that GPTQ chose for a sum are worth nothing one by one."""
    start = quantize(weight, spec)
    still = jnp.zeros((K, N))
    at = moved(start, rng, "scale")._replace(rounding=still)
    q = settled(weight, start, at)
    np.testing.assert_array_equal(q.codes, start.codes)
    if start.zeros is not None:
        np.testing.assert_array_equal(q.zeros, start.zeros)
    spread = lambda x: oracle.spread(np.asarray(x, np.float64), start.block, (K, N))
    expected = spread(at.scale) * oracle.dequantize(start)
    stored = {"bfloat16": 2**-8, "float16": 2**-11, "e4m3": 2**-4}
    rtol = stored.get(spec.scale, 1e-6)
    np.testing.assert_allclose(oracle.dequantize(q), expected, rtol, 1e-6)
    ends = moved(start, rng, "ends")._replace(rounding=still)
    assert not np.array_equal(settled(weight, start, ends).codes, start.codes)


def test_an_offset_of_half_reaches_both_neighbours_and_no_more(weight):
    start = quantize(weight, QuantSpec("uint4", GROUP, False))
    codes = np.asarray(start.code_values(), int)
    for v in (-0.5, 0.5):
        at = neutral(start)._replace(rounding=jnp.full((K, N), v, jnp.float32))
        step = np.asarray(settled(weight, start, at).code_values(), int) - codes
        assert set(np.unique(step)) == {0, int(np.sign(v))}
        assert 0.3 < np.mean(step != 0) < 0.7


def test_an_offset_of_a_codebook_counts_gaps_of_its_table():
    table = jnp.asarray(NF4, jnp.float32)
    start = quantize(table, QuantSpec("nf4", "tensor"))
    at = neutral(start)._replace(rounding=jnp.full(table.shape, 0.75, jnp.float32))
    np.testing.assert_array_equal(
        settled(table, start, at).dequantize(), [*NF4[1:], NF4[-1]]
    )


# -------------------------------------------------------------------------- gradients


def numpy_gradient(w, start, at, upstream):
    """The straight-through gradient of ``Σ upstream · ŵ``, from the equations."""
    spread = lambda x: oracle.spread(np.asarray(x, np.float64), start.block, (K, N))
    lowest, highest = start.spec.code_range
    s0, z0 = spread(oracle.scale_values(start)), spread(start.zeros)
    v, a, b = np.asarray(at.rounding, np.float64), spread(at.low), spread(at.high)
    by = spread(at.scale)
    stretch = (a * (z0 - lowest) + b * (highest - z0)) / (highest - lowest)
    s = s0 * stretch
    below = a * (z0 - lowest) / stretch
    z = np.clip(np.rint(lowest + below), lowest, highest)
    q = np.rint(np.asarray(w, np.float64) / s + v) + z
    inside = (q >= lowest) & (q <= highest)
    q = np.clip(q, lowest, highest)
    to_by = upstream * s * (q - z)
    upstream = upstream * by
    to_v = upstream * s * inside
    to_s = upstream * (q - z - np.asarray(w) / s * inside)
    to_z = upstream * s * (inside - 1.0)
    # s = s0 (α (z0 - l) + β (h - z0)) / (h - l),  z = l + α (z0 - l) s0 / s
    to_a = to_s * s0 * (z0 - lowest) / (highest - lowest) + to_z * (z0 - lowest) * (
        1 / stretch - a * (z0 - lowest) / (highest - lowest) / stretch**2
    )
    to_b = (
        to_s * s0 * (highest - z0) / (highest - lowest)
        - to_z * a * (z0 - lowest) * (highest - z0) / (highest - lowest) / stretch**2
    )
    total = lambda x: np.add.reduceat(x, np.arange(0, K, GROUP), 0)
    return Variables(to_v, total(to_a), total(to_b), total(to_by)), inside


def test_the_gradient_is_the_straight_through_one(rng):
    w = jnp.asarray(rng.standard_normal((K, N)), jnp.float32)
    start = quantize(w, QuantSpec("uint2", GROUP, False))
    at = moved(start, rng, size=0.3)  # all at once
    at = at._replace(scale=moved(start, rng, "scale").scale)
    upstream = rng.standard_normal((K, N))

    def loss(at):
        return jnp.sum(jnp.asarray(upstream, jnp.float32) * relaxed(w, start, at))

    got = jax.grad(loss)(at)
    expected, inside = numpy_gradient(w, start, at, upstream)
    assert 0.02 < 1 - inside.mean() < 0.5  # some are clipped: no gradient of v there
    np.testing.assert_allclose(got.rounding, expected.rounding, rtol=1e-4, atol=1e-6)
    for one, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_on_a_quadratic_every_offset_is_pulled_against_its_error(name, weight):
    """The sign of the gradient of ``½ (ŵ − t)²`` is that of ``ŵ − t``, times s's."""
    start = quantize(weight, SPECS[name])
    target = weight + 0.01
    at = neutral(start)

    def loss(at):
        return 0.5 * jnp.sum((relaxed(weight, start, at) - target) ** 2)

    got = np.sign(np.asarray(jax.grad(loss)(at).rounding))
    scale = oracle.spread(oracle.scale_values(start), start.block, (K, N))
    error = np.asarray(start.dequantize() - target)
    felt = got != 0
    np.testing.assert_array_equal(got[felt], (np.sign(error) * np.sign(scale))[felt])
    # dead columns feel nothing, nor does what lies beyond the outermost code
    values = np.asarray(start.code_values())
    outermost = np.isin(values, (values.min(), values.max()))
    assert np.all(felt | outermost | (np.abs(scale) < 1e-30))
    assert np.mean(felt) > 0.6
