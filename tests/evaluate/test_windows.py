"""Windows: every token in order, none twice, the rest dropped."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.evaluate import cut_windows


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
