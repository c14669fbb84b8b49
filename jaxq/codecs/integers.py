"""Integer matrices in the form that most formats store: unsigned codes with zeros."""

import dataclasses

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.unpacked import Unpacked

HALVES = (np.dtype("float16"), np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Integers:
    """An integer matrix, ``w = (code − zero) · scale``.

    Attributes:
        bits: per code.
        group: rows that share a scale.
        codes: uint8 ``[in, out]``, from 0.
        scales: ``[groups, out]``.
        zeros: uint8 ``[groups, out]``.
        symmetric: whether every zero point is ``2^(bits − 1)``.
    """

    bits: int
    group: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    symmetric: bool


def integers_of(w: Unpacked) -> Integers:
    """Return an integer matrix with one scale per group of rows and column.

    Scales of tiles are repeated over their columns, which changes nothing.

    Raises:
        UnsupportedError: the matrix is none; says what of it.
    """
    spec = w.spec
    if not spec.number_format.is_integer:
        raise UnsupportedError(f"its codes are {spec.format}, not integers")
    refuse_extras(w)
    if isinstance(w.scales, Unpacked) or spec.scale in ("e4m3", "e8m0"):
        raise UnsupportedError("its scales are quantized themselves")
    half = 2 ** (spec.bits - 1)
    signed = spec.number_format.lowest < 0
    codes = w.codes ^ np.uint8(0x80) if signed and spec.bits == 8 else w.codes
    groups, columns = w.grid()[0], w.shape[1]
    scales = over_columns(w.scales, groups, w)
    if w.zeros is None:
        zeros = np.full((groups, columns), half if signed else 0, np.uint8)
    else:
        zeros = over_columns(w.zeros, groups, w).astype(np.int16)
        zeros = (zeros + (half if signed else 0)).astype(np.uint8)
    middle = bool((zeros == half).all())
    return Integers(spec.bits, w.block[0], codes, scales, zeros, middle)


def over_columns(values: np.ndarray, groups: int, w: Unpacked) -> np.ndarray:
    """Return one value per group and column, of one per block."""
    if values.shape[1] > 1 and w.block[1] > 1:
        values = np.repeat(values, w.block[1], axis=1)[:, : w.shape[1]]
    return np.ascontiguousarray(np.broadcast_to(values, (groups, w.shape[1])))


def half_scales(w: Unpacked, scales: np.ndarray) -> np.ndarray:
    """Return scales in 16 bits, which must change none of them.

    Raises:
        UnsupportedError: neither float16 nor bfloat16 holds them all.
    """
    if scales.dtype in HALVES:
        return scales
    wide = scales.astype(np.float32)
    for dtype in sorted(HALVES, key=lambda d: d != w.dtype):
        with np.errstate(over="ignore"):
            narrow = wide.astype(dtype)
        if (narrow.astype(np.float32) == wide).all():
            return narrow
    raise UnsupportedError("its scales are float32 that 16 bits would round")


def refuse_extras(w: Unpacked) -> None:
    """Raise `UnsupportedError` where a matrix has what only jaxq knows."""
    if w.offset is not None:
        raise UnsupportedError("it has an offset after scaling")
    if w.input_scale is not None:
        raise UnsupportedError("it has a scale for its input, which was not folded")


def refuse_order(w: Unpacked) -> None:
    """Raise `UnsupportedError` where rows stand in another order than their input."""
    if w.index is not None:
        raise UnsupportedError(
            "its groups are of channels in another order (act-order)"
        )


def refuse_activation(w: Unpacked) -> str:
    """Return a note where a matrix wants its input quantized, which is not kept."""
    return "" if w.activation is None else "its activation is no longer quantized"
