"""Windows: cut in order, none twice, the rest dropped; or drawn at random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.evaluate import cut_windows, draw_windows


@given(st.integers(2, 200), st.integers(2, 50), st.integers(1, 5))
def test_windows_are_the_stream_in_order(count, length, limit):
    stream = np.arange(count)
    windows = cut_windows(stream, length, limit)
    width = min(length, count)
    expected = min(count // width, limit)
    assert windows.shape == (expected, width)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows.ravel(), stream[: expected * width])


def test_a_short_stream_is_one_window():
    assert cut_windows([5, 6, 7], 512).tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("tokens", "length", "limit", "said"),
    [
        ([], 8, None, r"the text has 0 token\(s\).*at least 2"),
        ([3], 8, None, r"the text has 1 token\(s\).*longer text"),
        ([3, 4], 1, None, "length is 1.*2 or more"),
        ([3, 4], 2, 0, "limit is 0.*at least 1"),
    ],
)
def test_refuses(tokens, length, limit, said):
    with pytest.raises(ValueError, match=said):
        cut_windows(tokens, length, limit)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 9), st.integers(0, 40))
def test_drawn_windows_are_pieces_of_the_stream(length, count, seed, more):
    stream = 3 * np.arange(length + count - 1 + more)
    windows = draw_windows(stream, length, count, seed)
    assert windows.shape == (count, length)
    assert windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 3).all()
    starts = windows[:, 0] // 3
    assert len(set(starts)) == count
    assert starts.min() >= 0
    assert windows.max() <= stream[-1]


def test_a_seed_is_a_draw():
    stream = np.arange(10_000)
    first = draw_windows(stream, 16, 8, 0)
    np.testing.assert_array_equal(first, draw_windows(list(stream), 16, 8, 0))
    assert (first != draw_windows(stream, 16, 8, 1)).any()


def test_every_offset_is_as_likely():
    """Of four offsets each is the first drawn a quarter of the time, ends included."""
    drawn = [int(draw_windows(range(8), 5, 1, seed)[0, 0]) for seed in range(800)]
    counts = np.bincount(drawn, minlength=4)
    # binomial: 200 on average with a standard deviation of 12.2; five of them
    assert (abs(counts - 200) < 61).all()
    assert len(counts) == 4


@pytest.mark.parametrize(
    ("tokens", "length", "count", "seed", "said"),
    [
        (range(5), 8, 1, 0, "5 tokens, fewer than one window of 8"),
        (range(10), 8, 4, 0, "3 different windows of 8, fewer than the 4 to draw"),
        (range(10), 0, 1, 0, "length is 0; give 1 or more"),
        (range(10), 4, 0, 0, "count is 0; give 1 or more"),
        (range(10), 4, 1, -1, "seed is -1; give 0 or more"),
    ],
)
def test_refuses_to_draw(tokens, length, count, seed, said):
    with pytest.raises(ValueError, match=said):
        draw_windows(tokens, length, count, seed)
