"""The block types of ggml: bytes of a block to codes, scales and offsets, and back.

A matrix is ``[out, in]``, every row whole blocks. K-quants have scales that are
integers times one float16 of the 256 elements. Products are rounded in ggml's order,
so the numbers are the same to the bit.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec

FLOAT_TYPES: dict[int, tuple[str, np.dtype]] = {
    0: ("F32", np.dtype("float32")),
    1: ("F16", np.dtype("float16")),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
    28: ("F64", np.dtype("float64")),
}
F32 = np.dtype("float32")


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One row of the table.

    Attributes:
        name: as ggml calls it.
        elements: of a block.
        nbytes: of a block.
        decode: ``uint8[out, blocks, nbytes]`` to a matrix.
        encode: the inverse, or None where it is only read.
    """

    name: str
    elements: int
    nbytes: int
    decode: Callable[[np.ndarray], Unpacked]
    encode: Callable[[Unpacked], np.ndarray] | None = None


def _half(raw: np.ndarray, start: int) -> np.ndarray:
    """Return the float16 of every block at byte ``start``: ``[blocks, out]``."""
    data = np.ascontiguousarray(raw[..., start : start + 2])
    return data.view("<f2")[..., 0].T


def _split(data: np.ndarray) -> np.ndarray:
    """Return low nibbles, then high nibbles, of the last axis."""
    return np.concatenate([data & 15, data >> 4], -1)


def _codes(codes: np.ndarray) -> np.ndarray:
    """Return ``[out, blocks, elements]`` as ``[in, out]``."""
    return codes.reshape(len(codes), -1).T


def _fifth(raw: np.ndarray, start: int) -> np.ndarray:
    """Return 32 bits of 4 bytes, one per element, in place for a 5-bit code."""
    bits = np.unpackbits(raw[..., start : start + 4], axis=-1, bitorder="little")
    return bits << 4


def _plain(
    kind: str, codes: np.ndarray, scales: np.ndarray, offset: np.ndarray | None = None
) -> Unpacked:
    """Return a matrix of blocks of 32 with a float16 scale each."""
    grid = "full" if kind.startswith("int") and kind != "int8" else "restricted"
    spec = QuantSpec(kind, 32, grid=grid, scale="float16")
    wide = None if offset is None else offset.astype(np.float32)
    return Unpacked(_codes(codes), scales, spec, (32, 1), F32, offset=wide)


def _q4_0(raw: np.ndarray) -> Unpacked:
    return _plain("int4", _split(raw[..., 2:]), _half(raw, 0))


def _q4_1(raw: np.ndarray) -> Unpacked:
    return _plain("uint4", _split(raw[..., 4:]), _half(raw, 0), _half(raw, 2))


def _q5_0(raw: np.ndarray) -> Unpacked:
    return _plain("int5", _split(raw[..., 6:]) | _fifth(raw, 2), _half(raw, 0))


def _q5_1(raw: np.ndarray) -> Unpacked:
    codes = _split(raw[..., 8:]) | _fifth(raw, 4)
    return _plain("uint5", codes, _half(raw, 0), _half(raw, 2))


def _q8_0(raw: np.ndarray) -> Unpacked:
    return _plain("int8", raw[..., 2:], _half(raw, 0))


def _mxfp4(raw: np.ndarray) -> Unpacked:
    spec = QuantSpec("fp4_e2m1", 32, scale="e8m0")
    scales = np.ascontiguousarray(raw[..., 0].T)
    return Unpacked(_codes(_split(raw[..., 1:])), scales, spec, (32, 1), F32)


def _super(
    kind: str,
    codes: np.ndarray,
    group: int,
    inner: str,
    scales: np.ndarray,
    d: np.ndarray,
    offset: np.ndarray | None = None,
) -> Unpacked:
    """Return a K-quant.

    Args:
        kind: the format of its codes.
        codes: ``[out, blocks, 256]``.
        group: elements per scale.
        inner: the format of the scales' codes.
        scales: those codes, ``[out, blocks, 256 / group]``.
        d: float16 ``[blocks, out]``, which multiply the scales.
        offset: float32, like the scales.
    """
    many = 256 // group
    of_scales = QuantSpec(inner, many, grid=_grid(inner), scale="float16")
    level = Unpacked(_codes(scales), d, of_scales, (many, 1), F32)
    spec = QuantSpec(kind, group, grid=_grid(kind), scale=of_scales)
    added = None if offset is None else _codes(offset)
    return Unpacked(_codes(codes), level, spec, (group, 1), F32, offset=added)


def _grid(kind: str) -> str:
    return "full" if kind.startswith("int") else "restricted"


def _six(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eight 6-bit scales and minima of 12 bytes."""
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], -1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], -1)
    return scales, minima


def _minus(minima: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    """Return what a minimum adds: ``[out, blocks, subblocks]``."""
    return -(dmin.T[..., None].astype(np.float32) * minima.astype(np.float32))


def _nibble_runs(data: np.ndarray) -> np.ndarray:
    """Return 256 codes of 128 bytes: runs of 32 low, then their 32 high nibbles."""
    runs = data.reshape(*data.shape[:-1], 4, 32)
    return _split(runs).reshape(*data.shape[:-1], 256)


def _pair_runs(data: np.ndarray) -> np.ndarray:
    """Return 256 2-bit codes of 64 bytes: four runs of 32 from each half."""
    halves = data.reshape(*data.shape[:-1], 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return ((halves >> shifts) & 3).reshape(*data.shape[:-1], 256)


def _q2_k(raw: np.ndarray) -> Unpacked:
    scales, codes = raw[..., :16], _pair_runs(raw[..., 16:80])
    minima = _minus(scales >> 4, _half(raw, 82))
    return _super("uint2", codes, 16, "uint4", scales & 15, _half(raw, 80), minima)


def _q3_k(raw: np.ndarray) -> Unpacked:
    mask, packed = raw[..., :32], raw[..., 96:108]
    bits = (mask[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _pair_runs(raw[..., 32:96]) | (bits.reshape(*mask.shape[:-1], 256) << 2)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = ((packed[..., None, 8:] >> shifts) & 3).reshape(*mask.shape[:-1], 16)
    scales = _split(packed[..., :8]) | (high << 4)
    return _super("int3", codes, 16, "int6", scales, _half(raw, 108))


def _q4_k(raw: np.ndarray) -> Unpacked:
    scales, minima = _six(raw[..., 4:16])
    codes = _nibble_runs(raw[..., 16:])
    offset = _minus(minima, _half(raw, 2))
    return _super("uint4", codes, 32, "uint6", scales, _half(raw, 0), offset)


def _q5_k(raw: np.ndarray) -> Unpacked:
    scales, minima = _six(raw[..., 4:16])
    high = raw[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
    high = (high & 1).reshape(*raw.shape[:-1], 256)
    codes = _nibble_runs(raw[..., 48:]) | (high << 4)
    offset = _minus(minima, _half(raw, 2))
    return _super("uint5", codes, 32, "uint6", scales, _half(raw, 0), offset)


def _q6_k(raw: np.ndarray) -> Unpacked:
    low = raw[..., :128].reshape(*raw.shape[:-1], 2, 64)
    low = _split(low).reshape(*raw.shape[:-1], 256)
    codes = low | (_pair_runs(raw[..., 128:192]) << 4)
    return _super("int6", codes, 16, "int8", raw[..., 192:208], _half(raw, 208))


def _write_q8_0(w: Unpacked) -> np.ndarray:
    _require(w, "int8", "Q8_0")
    return _joined(w, _blocks(w.codes))


def _write_q4_0(w: Unpacked) -> np.ndarray:
    _require(w, "int4", "Q4_0")
    codes = _blocks(w.codes)
    return _joined(w, codes[..., :16] | (codes[..., 16:] << 4))


def _blocks(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes.T).reshape(codes.shape[1], -1, 32)


def _joined(w: Unpacked, codes: np.ndarray) -> np.ndarray:
    if isinstance(w.scales, Unpacked):
        raise UnsupportedError("its scales are quantized")
    half = np.ascontiguousarray(w.scales.T.astype("<f2"))[..., None].view(np.uint8)
    return np.concatenate([half, codes], -1)


def _require(w: Unpacked, kind: str, name: str) -> None:
    plain = w.spec.format == kind and w.spec.scale == "float16"
    if not plain or w.block != (32, 1) or w.shape[0] % 32:
        raise UnsupportedError(
            f"{name} is {kind} in groups of 32 with float16 scales, and it is "
            f"{w.spec.describe()} of {w.shape[0]} channels"
        )
    if w.zeros is not None or w.offset is not None:
        raise UnsupportedError(f"{name} has no zero points, and it has")


TYPES: dict[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18, _q4_0, _write_q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0, _write_q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}
