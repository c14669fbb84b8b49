import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.scales import (
    affine,
    load_scale,
    power_of_two_floor,
    round_scale,
    store_scale,
    to_code_units,
)
from jaxq.spec import SCALE_DTYPES, QuantSpec

LOW = np.asarray([-1.0, -3.0, -0.5, 0.0, 2.0, -4.0, 0.0], np.float32)
HIGH = np.asarray([2.0, 1.0, 0.25, 3.0, 5.0, -1.0, 0.0], np.float32)
LARGEST = np.maximum(np.abs(LOW), np.abs(HIGH))


def scale_and_zero(spec, low=LOW, high=HIGH):
    return affine(jnp.asarray(low), jnp.asarray(high), spec)


def test_asymmetric_follows_the_equation_and_contains_zero():
    scale, zero = scale_and_zero(QuantSpec("uint4", symmetric=False))
    low, high = np.minimum(LOW, 0), np.maximum(HIGH, 0)
    want = (high - low) / 15
    np.testing.assert_allclose(scale, want, rtol=1e-6)
    with np.errstate(invalid="ignore"):
        want_zero = np.where(want == 0, 0, np.rint(-low / want))
    np.testing.assert_array_equal(zero, want_zero)
    # the ends are representable, up to the rounding of the zero point
    assert np.all((0 - np.asarray(zero)) * scale <= low + np.asarray(scale) / 2 + 1e-6)


def test_asymmetric_signed_integers_count_from_their_lowest():
    scale, zero = scale_and_zero(QuantSpec("int4", symmetric=False))
    unsigned_scale, unsigned_zero = scale_and_zero(QuantSpec("uint4", symmetric=False))
    np.testing.assert_array_equal(scale, unsigned_scale)
    positive = np.asarray(scale) > 0
    shifted = np.asarray(unsigned_zero)[positive] - 8
    np.testing.assert_array_equal(np.asarray(zero)[positive], shifted)


def test_the_three_symmetric_grids():
    restricted, none = scale_and_zero(QuantSpec("int4"))
    assert none is None
    np.testing.assert_allclose(restricted, LARGEST / 7, rtol=1e-6)
    gptq, _ = scale_and_zero(QuantSpec("int4", grid="gptq"))
    np.testing.assert_allclose(gptq, 2 * LARGEST / 15, rtol=1e-6)
    full, _ = scale_and_zero(QuantSpec("int4", grid="full"))
    extreme = np.where(np.abs(LOW) >= np.abs(HIGH), LOW, HIGH)
    # the extreme itself is the code −8
    np.testing.assert_allclose(-8 * np.asarray(full), extreme, rtol=1e-6)


def test_unsigned_symmetric_covers_the_positive_side():
    scale, _ = scale_and_zero(QuantSpec("uint8"))
    np.testing.assert_allclose(scale, np.maximum(HIGH, 0) / 255, rtol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp8_e4m3", "fp4_e2m1", "dynamic8"])
def test_other_formats_map_the_largest_to_the_largest(name):
    spec = QuantSpec(name)
    scale, _ = scale_and_zero(spec)
    np.testing.assert_allclose(
        np.asarray(scale) * spec.number_format.highest, LARGEST, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "emax"), [("fp4_e2m1", 2), ("fp8_e4m3", 8), ("fp8_e5m2", 15), ("int8", 6)]
)
def test_the_ocp_rule(name, emax, rng):
    """2^(⌊log2 amax⌋ − emax), OCP Microscaling v1.0 section 6.3."""
    amax = np.concatenate([2.0 ** rng.uniform(-100, 100, 500), 2.0 ** np.arange(-9, 9)])
    amax = amax.astype(np.float32)
    spec = QuantSpec(name, 32, scale="e8m0")
    scale, _ = scale_and_zero(spec, -amax, amax / 2)
    _, exponent = np.frexp(amax)
    np.testing.assert_array_equal(scale, np.ldexp(np.float32(1), exponent - 1 - emax))
    stored = store_scale(scale, "e8m0")
    np.testing.assert_array_equal(stored, exponent - 1 - emax + 127)
    np.testing.assert_array_equal(load_scale(stored, "e8m0"), scale)
    as_ml_dtypes = np.asarray(stored).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(as_ml_dtypes, scale)


@pytest.mark.parametrize(("name", "emax"), [("fp4_e2m1", 2), ("fp8_e4m3", 8)])
def test_other_powers_of_two(name, emax, rng):
    """One more from 1.75 on; or the least by which nothing saturates."""
    exact = np.outer([1, 1.5, 1.75, 1.7499999, 1.9999999], 2.0 ** np.arange(-9, 9))
    amax = np.concatenate([2.0 ** rng.uniform(-100, 100, 500), exact.ravel()])
    amax = amax.astype(np.float32)
    mantissa, exponent = np.frexp(amax.astype(np.float64))  # amax = mantissa · 2^e
    near, _ = scale_and_zero(
        QuantSpec(name, 32, scale="e8m0", exponent="near"), -amax, amax / 2
    )
    np.testing.assert_array_equal(
        near, np.ldexp(1.0, exponent - 1 - emax + (mantissa >= 1.75 / 2))
    )
    spec = QuantSpec(name, 32, scale="e8m0", exponent="ceil")
    ceil, _ = scale_and_zero(spec, -amax, amax / 2)
    ceil, top = np.asarray(ceil, np.float64), spec.number_format.highest
    assert (np.frexp(ceil)[0] == 0.5).all()  # powers of two
    # the quotient is rounded to float32 before it is rounded up
    assert (ceil * top >= amax * (1 - 2.0**-24)).all()
    assert (ceil * top / 2 < amax).all()


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_stored_scales_read_back_as_rounded(dtype, rng):
    scale = np.exp(rng.standard_normal(300)).astype(np.float32)
    spec = QuantSpec("int4", scale=dtype)
    rounded = round_scale(jnp.asarray(scale), spec)
    again = load_scale(store_scale(rounded, dtype), dtype)
    np.testing.assert_array_equal(again, rounded)
    bits, nbytes = {
        "float32": (23, 4),
        "bfloat16": (8, 2),
        "float16": (11, 2),
        "e4m3": (4, 1),
        "e8m0": (0, 1),
        "inverse_float32": (23, 4),
    }[dtype]
    np.testing.assert_allclose(rounded, scale, rtol=2.0**-bits)
    assert store_scale(rounded, dtype).dtype.itemsize == nbytes


def test_scales_beyond_the_storage_saturate_instead_of_becoming_infinite():
    huge = jnp.asarray([1e6, -1e6], jnp.float32)
    np.testing.assert_array_equal(
        load_scale(store_scale(huge, "float16"), "float16"), [65504.0, -65504.0]
    )
    np.testing.assert_array_equal(
        load_scale(store_scale(huge, "e4m3"), "e4m3"), [448.0, -448.0]
    )


def test_every_e8m0_code_but_nan_is_a_power_of_two():
    codes = np.arange(255, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = np.asarray(jax.device_get(load_scale(jnp.asarray(codes), "e8m0")))
    # compare bits: 2^-127 is subnormal
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_power_of_two_floor(rng):
    x = (2.0 ** rng.uniform(-60, 60, 1000)).astype(np.float32)
    x = np.concatenate([x, np.float32(2) ** np.arange(-20, 20), [0]]).astype(np.float32)
    mantissa, exponent = np.frexp(x)
    want = np.where(mantissa == 0, 0, np.ldexp(np.float32(1), exponent - 1))
    np.testing.assert_array_equal(power_of_two_floor(jnp.asarray(x)), want)


def test_code_units_are_clipped_to_the_range_and_zero_scales_are_harmless():
    x = jnp.asarray([-9.0, -1.26, 0.0, 1.26, 9.0], jnp.float32)
    one = jnp.asarray(0.5, jnp.float32)
    spec = QuantSpec("int4")
    np.testing.assert_allclose(
        to_code_units(x, one, None, spec), [-7, -2.52, 0, 2.52, 7]
    )
    asym = QuantSpec("uint4", symmetric=False)
    got = to_code_units(x, one, jnp.asarray(3.0, jnp.float32), asym)
    np.testing.assert_array_equal(got, [0, 0, 3, 6, 15])
    nothing = to_code_units(x * 0, one * 0, None, spec)
    np.testing.assert_array_equal(nothing, np.zeros(5))
