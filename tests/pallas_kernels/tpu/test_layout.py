"""The TPU layout: a bijection of codes, and the numbers they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import FORMATS
from pallas_kernels import layouts
from pallas_kernels.kernel import Coding
from pallas_kernels.tpu import layout

BLOCK = 64


def coding(name: str) -> Coding:
    fmt = FORMATS[name]
    if fmt.is_integer:
        return Coding("integer", fmt.bits, BLOCK, int(fmt.lowest))
    if name.startswith("fp8"):
        return Coding(fmt.dtype, 8, BLOCK)
    return Coding("table", fmt.bits, BLOCK, table=fmt.table)


@pytest.mark.parametrize(
    "name", ["int2", "int3", "uint4", "int4", "uint6", "int8", "uint8", "fp8_e4m3",
             "fp8_e5m2", "fp4_e2m1", "fp4_bnb", "nf4"],
)  # fmt: skip
def test_there_and_back_bit_for_bit_and_the_same_numbers(name, rng):
    fmt, how = FORMATS[name], coding(name)
    # every code, in a stack of two
    codes = rng.permuted(np.arange(2 * BLOCK * 4) % 2**fmt.bits).astype(np.uint8)
    codes = jnp.asarray(codes.reshape(2, BLOCK, 4))
    planar = layouts.pack(codes, fmt.bits, 1, BLOCK)
    elements = jax.jit(layout.prepack, static_argnums=1)(planar, how)
    assert layout.matrix(elements.shape, how) == (BLOCK, 4)
    back = jax.jit(layout.unpack, static_argnums=1)(elements, how)
    np.testing.assert_array_equal(back, planar)
    form = layout.stored(how)
    assert elements.dtype == form.dtype
    read = (elements.astype(jnp.float32) + form.shift) * form.factor
    numbers = np.asarray(fmt.decode(codes))
    finite = np.isfinite(numbers)
    # nf4 is rounded to 8 bits; everything else is exact up to float32
    most = 0.5 / 127 if name == "nf4" else 1e-6 * np.abs(numbers[finite])
    assert np.all(np.abs(np.asarray(read)[finite] - numbers[finite]) <= most)


def test_what_has_no_form_says_why():
    reason = layout.declines(coding("dynamic8"))
    assert reason == "a table of 256 numbers has no exact form in 8 bits"
    with pytest.raises(ValueError, match="table of 256 numbers"):
        layout.stored(coding("dynamic8"))
