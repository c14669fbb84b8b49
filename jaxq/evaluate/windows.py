"""A stream of tokens cut into windows of one length."""

from collections.abc import Sequence

import numpy as np


def cut_windows(
    tokens: Sequence[int] | np.ndarray, length: int, limit: int | None = None
) -> np.ndarray:
    """Cut a stream into windows that do not overlap.

    A rest shorter than a window is dropped, as GPTQ's evaluation does, so that numbers
    compare with published ones. A stream shorter than one window is one window.

    Args:
        tokens: the whole text as one stream.
        length: tokens per window.
        limit: at most so many windows; None takes all.

    Returns:
        ``int32[windows, tokens]``.

    Raises:
        ValueError: when a window has no token to predict: ``length`` or the stream is
            below 2; or when ``limit`` is below 1.

    Example:
        >>> cut_windows(range(7), 3).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    stream = np.asarray(tokens, dtype=np.int32)
    if length < 2:
        raise ValueError(
            f"length is {length}, but a window's first token is never predicted: "
            f"give 2 or more"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1 window, or None for all")
    if stream.size < 2:
        raise ValueError(
            f"the text has {stream.size} token(s), and predicting one takes at least "
            f"2: give a longer text"
        )
    length = min(length, stream.size)
    windows = stream[: stream.size // length * length].reshape(-1, length)
    return windows[:limit]
