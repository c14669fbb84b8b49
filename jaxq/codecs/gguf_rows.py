"""The order of rows in GGUF files: what llama.cpp moves of queries, keys and values."""

import re

import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.codecs.gguf_architectures import Architecture


def row_order(
    architecture: Architecture, module: str, rows: int, heads: tuple[int, int]
) -> np.ndarray | None:
    """Return which row of Hugging Face's each row of a file is; None: its own.

    Args:
        architecture: whose file.
        module: by Hugging Face's name.
        rows: of its weight, or of its bias.
        heads: query heads and key heads.

    Raises:
        CheckpointError: the rows are not those of so many heads.
    """
    queries, keys = heads
    found = re.search(r"\.([qk])_proj$", module)
    if architecture.interleaved and found:
        count = queries if found[1] == "q" else keys
        return _halves(_split(module, rows, count, 2))
    if architecture.fused is not None and module.endswith(f".{architecture.fused}"):
        if queries % keys:
            raise CheckpointError(
                f"{keys} key heads must divide {queries} query heads, or no query has "
                f"the key of {module!r}"
            )
        return _apart(_split(module, rows, keys, queries // keys + 2))
    return None


def _split(module: str, rows: int, heads: int, parts: int) -> np.ndarray:
    if rows % (heads * parts):
        raise CheckpointError(
            f"{module!r} has {rows} rows, which are no {heads} heads of {parts} parts"
        )
    return np.arange(rows).reshape(heads, parts, -1)


def _halves(rows: np.ndarray) -> np.ndarray:
    """Return the two rotary halves of every head by turns."""
    return rows.swapaxes(1, 2).reshape(-1)


def _apart(rows: np.ndarray) -> np.ndarray:
    """Return all queries, all keys, all values, where each key head had its own."""
    parts = rows[:, :-2], rows[:, -2], rows[:, -1]
    return np.concatenate([part.reshape(-1) for part in parts])
