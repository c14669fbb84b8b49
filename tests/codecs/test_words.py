"""Codes in words, against Python's integers of any size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.codecs.words import (
    nibbles,
    pack_stream,
    pair_nibbles,
    unpack_fields,
    unpack_stream,
)

BITS = range(1, 9)


def _stream(codes: list[int], bits: int) -> int:
    return sum(code << (bits * i) for i, code in enumerate(codes))


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_a_stream_is_one_large_number(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count, np.uint8)
    words = pack_stream(codes, bits, 0)
    assert words.dtype == np.int32
    number = int.from_bytes(words.astype("<i4").tobytes(), "little")
    assert number == _stream(codes.tolist(), bits)
    assert words.size == -(-count * bits // 32)
    np.testing.assert_array_equal(unpack_stream(words, bits, 0, count), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_either_axis(bits, axis):
    codes = np.random.default_rng(0).integers(0, 2**bits, (50, 30), np.uint8)
    words = pack_stream(codes, bits, axis)
    count = codes.shape[axis]
    np.testing.assert_array_equal(unpack_stream(words, bits, axis, count), codes)
    lines = codes if axis else codes.T
    found = words if axis else words.T
    for line, packed in zip(lines, found, strict=True):
        data = np.ascontiguousarray(packed).astype("<i4").tobytes()
        assert int.from_bytes(data, "little") == _stream(line.tolist(), bits)


@pytest.mark.parametrize("bits", BITS)
def test_fields_leave_the_top_of_a_word_alone(bits):
    per, codes = 32 // bits, np.random.default_rng(0).integers(0, 2**bits, 40, np.uint8)
    padded = np.pad(codes, (0, -40 % per)).reshape(-1, per).tolist()
    words = np.asarray([_stream(row, bits) for row in padded], np.uint32)
    found = unpack_fields(words.view(np.int32), bits, 0, 40)
    np.testing.assert_array_equal(found, codes)
    if 32 % bits == 0:
        np.testing.assert_array_equal(found, unpack_stream(words, bits, 0, 40))


def test_nibbles():
    data = np.arange(256, dtype=np.uint8).reshape(2, 128)
    codes = nibbles(data)
    assert codes[0, :4].tolist() == [0, 0, 1, 0]
    assert codes[1, -2:].tolist() == [15, 15]
    np.testing.assert_array_equal(pair_nibbles(codes), data)
