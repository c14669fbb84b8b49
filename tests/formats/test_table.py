"""What every row of `FORMATS` promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import FORMATS
from jaxq.names import UnknownNameError, lookup

EVERY = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))


@functools.cache
def probed(fmt):
    """Special numbers, then an ascending row of others: numbers, codes, read back."""
    special = [0.0, -1e30, 1e30, fmt.lowest, fmt.highest]
    span = 1.1 * max(abs(fmt.lowest), fmt.highest)
    x = np.concatenate([special, np.linspace(-span, span, 4001)]).astype(np.float32)
    codes = jax.jit(fmt.encode)(x)
    return x, codes, np.asarray(jax.jit(fmt.decode)(codes))


@EVERY
def test_a_row_is_hashable_and_named_by_its_key(fmt):
    assert FORMATS[fmt.name] is fmt
    assert hash(fmt) == hash(dataclasses.replace(fmt))
    assert 1 <= fmt.bits <= 8


@EVERY
def test_zero_is_exact_and_the_ends_saturate(fmt):
    want = [0.0, fmt.lowest, fmt.highest, fmt.lowest, fmt.highest]
    np.testing.assert_array_equal(probed(fmt)[2][:5], np.asarray(want, np.float32))


@EVERY
def test_codes_are_bytes_below_two_to_the_bits(fmt):
    x, codes, values = probed(fmt)
    assert codes.dtype == jnp.uint8
    assert codes.shape == x.shape
    assert np.asarray(codes).max() < 2**fmt.bits
    assert values.dtype == np.float32


@EVERY
def test_rounding_is_monotone(fmt):
    assert np.all(np.diff(probed(fmt)[2][5:]) >= 0)


@EVERY
def test_narrow_floats_in_and_out(fmt):
    x = np.linspace(fmt.lowest, fmt.highest, 4006).astype(np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16)

    @jax.jit
    def run(narrow):
        codes = fmt.encode(narrow)
        wide = fmt.encode(narrow.astype(jnp.float32))
        return codes, wide, fmt.decode(codes, jnp.bfloat16), fmt.decode(codes)

    codes, wide, short, long = run(narrow)
    np.testing.assert_array_equal(codes, wide)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_array_equal(short, np.asarray(long).astype(short.dtype))


@EVERY
def test_abstract_shapes(fmt):
    codes = jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert (codes.shape, codes.dtype) == ((3, 4), jnp.uint8)


def test_a_mistyped_name_is_answered_with_the_right_one():
    with pytest.raises(UnknownNameError, match=r"'itn4'.*did you mean 'int4'.*nf4"):
        lookup(FORMATS, "itn4", "format")
