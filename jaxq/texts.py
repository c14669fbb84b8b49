"""Texts of many lengths as batches of few shapes."""

import re
from collections.abc import Iterable, Sequence

import numpy as np


def checked_texts(calibration: str | Sequence[str]) -> Sequence[str]:
    """Return the texts, or raise where something else was given."""
    texts = [calibration] if isinstance(calibration, str) else calibration
    is_sequence = isinstance(texts, Sequence) and not isinstance(texts, bytes)
    wrong = [t for t in texts if not isinstance(t, str)] if is_sequence else [texts]
    if wrong:
        raise TypeError(
            f"calibration holds {type(wrong[0]).__name__}: give a text, a list of "
            f"texts, or an array of integers [sequences, tokens] (of a file, give "
            f"what it holds: Path(...).read_text())"
        )
    return texts


def cut_texts(text: str) -> list[str]:
    r"""Cut a text at its empty lines, or at the ends of lines where it has none.

    Example:
        >>> cut_texts("One, that\ngoes on.\n\nTwo."), cut_texts("One.\nTwo.")
        (['One, that goes on.', 'Two.'], ['One.', 'Two.'])
    """
    parts = re.split(r"\n\s*\n", text.strip())
    parts = text.splitlines() if len(parts) == 1 else parts
    texts = (" ".join(part.split()) for part in parts)
    return [one for one in texts if one]


def within(sequences: Iterable[list[int]], budget: int) -> list[list[int]]:
    """Return the first sequences, as many as have ``budget`` tokens together."""
    out: list[list[int]] = []
    for one in sequences:
        budget -= len(one)
        if budget < 0 and out:
            break
        out.append(one)
    return out


def padded(
    ids: Sequence[list[int]], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and which are no padding, both ``[rows, width]``."""
    tokens = np.zeros((rows, width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one
        mask[row, : len(one)] = True
    return tokens, mask


def attended(mask: np.ndarray) -> np.ndarray:
    """Return the mask with something to attend to in rows that are all padding."""
    return mask | (~mask.any(1, keepdims=True) & (np.arange(mask.shape[1]) == 0))


def next_power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()
