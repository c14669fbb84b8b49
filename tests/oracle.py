"""What a `QTensor` says, computed the slow way: NumPy, float64, one bit at a time."""

import ml_dtypes
import numpy as np

from jaxq.formats import FORMATS
from jaxq.qtensor import QTensor

PLANES = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


def unpack(packed: np.ndarray, bits: int, axis: int, block: int) -> np.ndarray:
    """The codes of planar packing, row by row as its module describes the layout."""
    if bits == 8:
        return packed
    packed = np.moveaxis(np.asarray(packed), axis, 0).astype(np.uint64)
    rows = []
    for row in range(packed.shape[0] * 8 // bits):
        number, inside = divmod(row, block)
        byte, low, code = number * block * bits // 8, 0, np.uint64(0)
        for width in PLANES[bits]:
            per_field = block // (8 // width)
            field, place = divmod(inside, per_field)
            value = packed[byte + place] >> np.uint64(width * field)
            code = code | ((value & np.uint64(2**width - 1)) << np.uint64(low))
            byte, low = byte + per_field, low + width
        rows.append(code)
    return np.moveaxis(np.stack(rows), 0, axis).astype(np.uint8)


def scale_values(q: QTensor) -> np.ndarray:
    """The scales of ``q`` as float64, one per block."""
    if isinstance(q.scales, QTensor):
        # the library reads scales back in float32
        return dequantize(q.scales).astype(np.float32).astype(np.float64)
    stored = np.asarray(q.scales)
    if q.spec.scale == "e4m3":
        stored = stored.view(ml_dtypes.float8_e4m3fn)
    if q.spec.scale == "e8m0":
        return np.ldexp(1.0, stored.astype(np.int64) - 127)
    return stored.astype(np.float64)


def spread(values: np.ndarray, block: tuple[int, ...], shape: tuple[int, ...]):
    """One value per block at every element."""
    for axis, (size, length) in enumerate(zip(block, shape, strict=True)):
        index = np.arange(length) // size
        values = np.take(values, np.minimum(index, values.shape[axis] - 1), axis)
    return values


def dequantize(q: QTensor) -> np.ndarray:
    """``((code − zero) · scale + offset) · input_scale`` in float64.

    Rows that an input index gives to one channel are added up.
    """
    bits = q.spec.bits
    axis = q.axis % q.codes.ndim
    codes = unpack(np.asarray(q.codes), bits, axis, q.pack)
    length = codes.shape[axis] - q.padding
    codes = np.take(codes, np.arange(length), axis)
    table = np.asarray(FORMATS[q.spec.format].decode(np.arange(2**bits, dtype="uint8")))
    values = table.astype(np.float64)[codes]
    block = (1,) * (codes.ndim - len(q.block)) + q.block[-codes.ndim :]
    if q.zeros is not None:
        values = values - spread(np.asarray(q.zeros, np.float64), block, codes.shape)
    values = values * spread(scale_values(q), block, codes.shape)
    if q.offset is not None:
        # the product is rounded to float32 before the offset is added
        values = values.astype(np.float32) + np.asarray(q.offset, np.float64)
    if q.input_scale is not None:
        values = values * np.asarray(q.input_scale, np.float64)
    if q.input_index is not None:
        total = np.zeros(q.shape)
        place = list(np.indices(values.shape))
        place[axis] = np.broadcast_to(np.asarray(q.input_index), values.shape)
        np.add.at(total, tuple(place), values)
        values = total
    return values
