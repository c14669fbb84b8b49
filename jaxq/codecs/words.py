"""Codes in 32-bit words: dense streams, and whole fields per word (NumPy).

A *stream* has code i at bits ``b·i .. b·i + b − 1`` of the words laid end to end, low
bits first, so ``32`` codes fill ``b`` words and some straddle two. *Fields* put
``⌊32 / b⌋`` codes into a word and leave its top bits alone. For 2, 4 and 8 bits the two
are the same thing.
"""

import numpy as np

CYCLE = 32


def unpack_stream(words: np.ndarray, bits: int, axis: int, count: int) -> np.ndarray:
    """Return the first ``count`` codes of a stream along ``axis``.

    Args:
        words: int32 or uint32; ``⌈count · bits / 32⌉`` of them along ``axis``.
        bits: per code, 1 to 8.
        axis: along which words follow each other.
        count: codes to return.

    Returns:
        uint8.

    Example:
        >>> unpack_stream(np.asarray([0x76543210], np.int32), 4, 0, 8).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    words = _first(words.view(np.uint32), axis)
    rest = -len(words) % bits
    if rest:
        words = np.concatenate([words, np.zeros((rest, *words.shape[1:]), np.uint32)])
    words = words.reshape(-1, bits, *words.shape[1:])
    out = np.empty((len(words), CYCLE, *words.shape[2:]), np.uint8)
    mask = np.uint32(2**bits - 1)
    for i in range(CYCLE):
        word, shift = divmod(i * bits, 32)
        value = words[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= words[:, word + 1] << np.uint32(32 - shift)
        out[:, i] = value & mask
    codes = out.reshape(-1, *out.shape[2:])[:count]
    return np.moveaxis(codes, 0, axis)


def pack_stream(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Invert `unpack_stream`: int32 words, the last one filled up with zeros.

    Example:
        >>> hex(pack_stream(np.arange(8, dtype=np.uint8), 4, 0)[0])
        '0x76543210'
    """
    rows = _first(codes, axis)
    count = len(rows)
    rest = np.zeros((-count % CYCLE, *rows.shape[1:]), np.uint8)
    rows = np.concatenate([rows, rest]) if len(rest) else rows
    rows = rows.reshape(-1, CYCLE, *rows.shape[1:])
    out = np.zeros((len(rows), bits, *rows.shape[2:]), np.uint32)
    for i in range(CYCLE):
        word, shift = divmod(i * bits, 32)
        value = rows[:, i].astype(np.uint32)
        out[:, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            out[:, word + 1] |= value >> np.uint32(32 - shift)
    words = out.reshape(-1, *out.shape[2:])[: -(-count * bits // 32)]
    return np.ascontiguousarray(np.moveaxis(words, 0, axis).view(np.int32))


def unpack_fields(words: np.ndarray, bits: int, axis: int, count: int) -> np.ndarray:
    """Return the first ``count`` codes of which ``⌊32 / bits⌋`` lie in each word."""
    rows = _first(words.view(np.uint32), axis)
    per = 32 // bits
    out = np.empty((len(rows), per, *rows.shape[1:]), np.uint8)
    for i in range(per):
        out[:, i] = (rows >> np.uint32(i * bits)) & np.uint32(2**bits - 1)
    return np.moveaxis(out.reshape(-1, *out.shape[2:])[:count], 0, axis)


def nibbles(data: np.ndarray) -> np.ndarray:
    """Return the two nibbles of every byte along the last axis, the low one first."""
    out = np.empty((*data.shape, 2), np.uint8)
    out[..., 0], out[..., 1] = data & 15, data >> 4
    return out.reshape(*data.shape[:-1], -1)


def pair_nibbles(codes: np.ndarray) -> np.ndarray:
    """Invert `nibbles`."""
    return np.ascontiguousarray(codes[..., ::2] | (codes[..., 1::2] << 4))


def _first(a: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(a, axis, 0)
