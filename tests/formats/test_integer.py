import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import FORMATS, IntegerFormat

INTEGERS = [f for f in FORMATS.values() if isinstance(f, IntegerFormat)]
EVERY = pytest.mark.parametrize("fmt", INTEGERS, ids=lambda f: f.name)


def test_there_are_two_to_eight_bits_of_each_kind():
    names = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)}
    assert {fmt.name for fmt in INTEGERS} == names


@EVERY
def test_range_and_codes(fmt):
    signed = fmt.name.startswith("int")
    low = -(2 ** (fmt.bits - 1)) if signed else 0
    assert (fmt.lowest, fmt.highest) == (low, low + 2**fmt.bits - 1)
    assert fmt.is_integer
    integers = np.arange(low, low + 2**fmt.bits)
    codes = fmt.encode(jnp.asarray(integers, jnp.float32))
    assert codes.dtype == jnp.uint8
    # int8 in two's complement, the others counted from the lowest
    want = integers % 256 if fmt.name == "int8" else integers - low
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(fmt.decode(codes), integers)
    narrow = fmt.decode(codes, jnp.int32)
    assert narrow.dtype == jnp.int32
    np.testing.assert_array_equal(narrow, integers)


@EVERY
def test_rounds_half_to_even_and_saturates(fmt, rng):
    x = rng.uniform(-300, 300, 4000).astype(np.float32)
    halves = np.arange(-300.5, 300.5, 0.5, dtype=np.float32)
    x = np.concatenate([x, halves, [-np.inf, np.inf]]).astype(np.float32)
    got = jax.jit(lambda x: fmt.decode(fmt.encode(x)))(x)
    want = np.clip(np.rint(x.astype(np.float64)), fmt.lowest, fmt.highest)
    np.testing.assert_array_equal(got, want)


def test_every_integer_is_exact_in_bfloat16():
    codes = jnp.arange(256, dtype=jnp.uint8)
    for name in ("int8", "uint8"):
        fmt = FORMATS[name]
        narrow = fmt.decode(codes, jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(narrow, fmt.decode(codes))
