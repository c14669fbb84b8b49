"""What every row of `FORMATS` promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import FORMATS
from jaxq.names import UnknownNameError, lookup

EVERY = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))


@EVERY
def test_a_row_is_hashable_and_named_by_its_key(fmt):
    assert FORMATS[fmt.name] is fmt
    assert hash(fmt) == hash(dataclasses.replace(fmt))
    assert 1 <= fmt.bits <= 8


@EVERY
def test_zero_is_exact_and_the_ends_saturate(fmt):
    x = jnp.asarray([0.0, -1e30, 1e30, fmt.lowest, fmt.highest], jnp.float32)
    got = fmt.decode(fmt.encode(x))
    want = [0.0, fmt.lowest, fmt.highest, fmt.lowest, fmt.highest]
    np.testing.assert_array_equal(got, np.asarray(want, np.float32))


@EVERY
def test_codes_are_bytes_below_two_to_the_bits(fmt, rng):
    x = rng.standard_normal((7, 5)).astype(np.float32) * max(fmt.highest, 1) / 2
    codes = fmt.encode(jnp.asarray(x))
    assert codes.dtype == jnp.uint8
    assert codes.shape == x.shape
    assert int(codes.max()) < 2**fmt.bits
    assert fmt.decode(codes, jnp.bfloat16).dtype == jnp.bfloat16


@EVERY
def test_encode_takes_narrow_floats(fmt):
    x = np.linspace(fmt.lowest, fmt.highest, 33).astype(np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16)
    wide = fmt.encode(narrow.astype(jnp.float32))
    np.testing.assert_array_equal(fmt.encode(narrow), wide)


@EVERY
def test_rounding_is_monotone(fmt):
    span = 1.1 * max(abs(fmt.lowest), fmt.highest)
    x = jnp.linspace(-span, span, 4001, dtype=jnp.float32)
    assert np.all(np.diff(np.asarray(fmt.decode(fmt.encode(x)))) >= 0)


@EVERY
def test_abstract_shapes(fmt):
    codes = jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert (codes.shape, codes.dtype) == ((3, 4), jnp.uint8)


def test_a_mistyped_name_is_answered_with_the_right_one():
    with pytest.raises(UnknownNameError, match=r"'itn4'.*did you mean 'int4'.*nf4"):
        lookup(FORMATS, "itn4", "format")
