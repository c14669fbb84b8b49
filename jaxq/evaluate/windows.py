"""A stream of tokens cut into windows of one length, in order or drawn at random."""

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


def draw_windows(
    tokens: Sequence[int] | np.ndarray, length: int, count: int, seed: int
) -> np.ndarray:
    """Draw windows at random offsets of a stream, as calibration data is drawn.

    Offsets are distinct; windows may overlap. The same seed gives the same windows on
    every machine (`numpy.random.default_rng`), so two recipes with one seed see the
    same data.

    Args:
        tokens: the whole text as one stream.
        length: tokens per window.
        count: how many windows.
        seed: of the draw, 0 or more.

    Returns:
        ``int32[count, length]``.

    Raises:
        ValueError: when the stream is shorter than a window, has fewer than ``count``
            of them, or an argument is out of its range.

    Example:
        >>> draw_windows(range(100), 4, 2, seed=0).tolist()
        [[81, 82, 83, 84], [61, 62, 63, 64]]
    """
    stream = np.asarray(tokens, dtype=np.int32)
    for name, value, least in (
        ("length", length, 1), ("count", count, 1), ("seed", seed, 0)
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")
    offsets = stream.size - length + 1
    if offsets < 1:
        raise ValueError(
            f"the text has {stream.size:,} tokens, fewer than one window of {length:,}:"
            f" give a longer text, or a shorter length"
        )
    if offsets < count:
        raise ValueError(
            f"the text has {stream.size:,} tokens, so {offsets:,} different windows of "
            f"{length:,}, fewer than the {count:,} to draw: give a longer text, or "
            f"draw fewer or shorter windows"
        )
    starts = np.random.default_rng(seed).choice(offsets, size=count, replace=False)
    return stream[starts[:, None] + np.arange(length)]
