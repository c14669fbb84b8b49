import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import layouts
from tests import oracle

BITS = range(1, 9)


# bits, axis, rows per packing block: every width, axis and a few odd blocks
CASES = [
    (1, 0, 8), (2, 1, 16), (3, 2, 8), (3, 0, 128), (4, 1, 24), (4, 0, 128), (5, 2, 40),
    (6, 0, 64), (7, 1, 16), (8, 2, 1), (8, 0, 128),
]  # fmt: skip


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def there_and_back(codes, bits, axis, block):
    packed = layouts.pack(codes, bits, axis, block)
    return packed, layouts.unpack(packed, bits, axis, block)


@pytest.mark.parametrize(("bits", "axis", "block"), CASES)
def test_pack_lays_bits_as_documented_and_unpack_inverts(bits, axis, block, rng):
    shape = [2, 1, 3]
    shape[axis] = 3 * block
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    packed, back = there_and_back(codes, bits, axis, block)
    assert packed.dtype == jnp.uint8
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(oracle.unpack(packed, bits, axis, block), codes)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_some_rows(bits, rng):
    codes = rng.integers(0, 2**bits, (96, 5), dtype=np.uint8)
    packed, _ = there_and_back(codes, bits, 0, 32)
    rows = rng.integers(0, 96, 40)
    got = layouts.unpack_rows(packed, bits, 32, jnp.asarray(rows))
    np.testing.assert_array_equal(got, codes[rows])


def test_the_documented_picture_of_four_bits():
    codes = np.arange(128, dtype=np.uint8) % 13
    packed = np.asarray(there_and_back(codes, 4, 0, 128)[0])
    np.testing.assert_array_equal(packed, codes[:64] | codes[64:] << 4)


def test_the_documented_picture_of_three_bits():
    codes = (np.arange(128, dtype=np.uint8) * 5) % 8
    packed = np.asarray(there_and_back(codes, 3, 0, 128)[0])
    low, high = codes & 3, codes >> 2
    two = sum(low[32 * i : 32 * (i + 1)] << (2 * i) for i in range(4))
    one = sum(high[16 * i : 16 * (i + 1)] << i for i in range(8))
    np.testing.assert_array_equal(packed, np.concatenate([two, one]))


@pytest.mark.parametrize("bits", BITS)
def test_planes_join_to_the_codes_block_by_block(bits, rng):
    codes = rng.integers(0, 2**bits, (2, 64, 3), dtype=np.uint8)
    packed = jnp.stack([there_and_back(one, bits, 0, 16)[0] for one in codes])
    # leading axes ride along
    planes = layouts.split_planes(packed, bits, 16)
    widths = [plane.shape[-2] * 8 // 16 for plane in planes]
    assert tuple(widths) == layouts.plane_widths(bits)
    joined = jax.jit(lambda p: layouts.join_planes(p, bits))(planes)
    np.testing.assert_array_equal(joined, codes.reshape(2, 4, 16, 3))


@pytest.mark.parametrize("bits", BITS)
def test_planes_divide_a_byte_and_add_up(bits):
    widths = layouts.plane_widths(bits)
    assert sum(widths) == bits
    assert all(8 % width == 0 for width in widths)
    assert widths == oracle.PLANES[bits]


@given(st.integers(1, 400), st.integers(1, 7), st.integers(1, 400))
def test_pack_block_divides_what_it_must(eighths, bits, group):
    length = 8 * eighths
    block = layouts.pack_block(length, bits, group)
    assert 8 <= block <= 128
    assert length % block == 0
    assert block & (block - 1) == 0
    if group < length and group % 8 == 0:
        assert group % block == 0


def test_packing_is_jittable_and_abstract():
    shape = jax.eval_shape(
        lambda c: layouts.pack(c, 3, 1, 64), jax.ShapeDtypeStruct((5, 128), jnp.uint8)
    )
    assert shape.shape == (5, 48)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match=rf"1\.\.8.*{bits}"):
        layouts.plane_widths(bits)


def test_rows_that_do_not_fill_bytes_are_named_with_a_remedy():
    with pytest.raises(ValueError, match=r"100 rows of 4-bit.*pad.*\(104\)"):
        layouts.pack_block(100, 4, 32)
    assert layouts.pack_block(101, 8, 32) == 1
