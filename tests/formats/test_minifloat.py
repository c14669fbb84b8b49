import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.formats import FORMATS

DTYPES = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
EVERY = pytest.mark.parametrize(("name", "dtype"), DTYPES.items(), ids=list(DTYPES))
CODES = np.arange(256, dtype=np.uint8)


@EVERY
def test_every_code_is_its_bit_pattern(name, dtype):
    want = CODES.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(FORMATS[name].decode(jnp.asarray(CODES)), want)


@EVERY
def test_finite_codes_survive_a_round_trip(name, dtype):
    finite = CODES[np.isfinite(CODES.view(dtype).astype(np.float32))]
    fmt = FORMATS[name]
    np.testing.assert_array_equal(fmt.encode(fmt.decode(jnp.asarray(finite))), finite)


def test_the_facts_of_e4m3():
    fmt = FORMATS["fp8_e4m3"]
    values = np.asarray(fmt.decode(jnp.asarray(CODES)))
    assert np.isfinite(values).sum() == 254
    assert not np.isinf(values).any()
    assert (fmt.lowest, fmt.highest) == (-448, 448)
    assert values[values > 0].min() == 2.0**-9
    assert values[8] == 2.0**-6  # exponent 1, mantissa 0: the smallest normal number


def test_the_facts_of_e5m2():
    fmt = FORMATS["fp8_e5m2"]
    values = np.asarray(fmt.decode(jnp.asarray(CODES)))
    assert (fmt.lowest, fmt.highest) == (-57344, 57344)
    assert values[values > 0].min() == 2.0**-16


def probes(dtype, rng):
    """Random floats over the whole range, every half-way point, and its neighbours."""
    size = 200_000
    x = rng.standard_normal(size) * np.exp(rng.uniform(-16, 12, size))
    values = CODES.view(dtype).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    up = np.nextafter(middle, np.float32(np.inf))
    down = np.nextafter(middle, np.float32(-np.inf))
    return np.concatenate([x, middle, up, down]).astype(np.float32)


@EVERY
def test_rounding_is_bit_for_bit_that_of_ml_dtypes(name, dtype, rng):
    x = probes(dtype, rng)
    fmt = FORMATS[name]
    want = np.clip(x, fmt.lowest, fmt.highest).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(x)), want)
    np.testing.assert_array_equal(jax.jit(fmt.encode)(x), want)


@EVERY
def test_what_is_too_large_saturates(name, dtype):
    fmt = FORMATS[name]
    x = jnp.asarray([1e9, -1e9, np.inf, -np.inf, 460.0, 6e4], jnp.float32)
    values = np.asarray(fmt.decode(fmt.encode(x)))
    top = fmt.highest
    np.testing.assert_array_equal(values[:4], [top, -top, top, -top])
    assert np.isfinite(values).all()


@EVERY
def test_relative_mse_of_a_unit_gaussian(name, dtype, rng):
    """Unscaled N(0, 1): 7.05e-4 for e4m3, 2.80e-3 for e5m2 (exact integrals)."""
    x = rng.standard_normal(1 << 20).astype(np.float32)
    fmt = FORMATS[name]
    error = np.asarray(fmt.decode(fmt.encode(jnp.asarray(x)))) - x
    want = {"fp8_e4m3": 7.05e-4, "fp8_e5m2": 2.80e-3}[name]
    assert np.mean(error**2) / np.mean(x**2) == pytest.approx(want, rel=0.01)
