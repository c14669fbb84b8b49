"""`Unpacked`: a quantized matrix as plain NumPy arrays, between a file and a `QTensor`.

Every codec reads into it and writes from it, always as ``[in, out]``: rows are the
contracted channels. No number passes through a float: codes and scales are moved.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.qtensor import QTensor
from jaxq.quantize import padded_length
from jaxq.relayout import PLANAR, relayout
from jaxq.spec import Block, QuantSpec
from pallas_kernels import layouts


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """One quantized matrix: ``w[k, n] = (code − zero) · scale + offset``.

    Attributes:
        codes: uint8 ``[in, out]``, as ``spec.number_format`` encodes.
        scales: one per block, as ``spec.scale`` stores them; or `Unpacked` themselves.
        spec: format, blocks and scales.
        block: elements that share a scale, ``(in, out)``.
        dtype: of the matrix it stands for; None: the model's.
        zeros: one per block, in code units, or None.
        offset: float32, one per block, or None.
        index: int32 ``[in]``, the input channel that meets each row; None: its own.
        input_scale: float32 ``[in, 1]``, or None.
        activation: how products quantize their input, or None.
        activation_scale: its static scale, or None (dynamic).
        activation_zero: the zero point that goes with it.
        note: what of the file it does not honour; empty: nothing.
    """

    codes: np.ndarray
    scales: "np.ndarray | Unpacked"
    spec: QuantSpec
    block: tuple[int, int]
    dtype: Any
    zeros: np.ndarray | None = None
    offset: np.ndarray | None = None
    index: np.ndarray | None = None
    input_scale: np.ndarray | None = None
    activation: QuantSpec | None = None
    activation_scale: np.ndarray | None = None
    activation_zero: np.ndarray | None = None
    note: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``(in, out)``."""
        return self.codes.shape[0], self.codes.shape[1]

    def tensor(self, transposed: bool = False) -> QTensor:
        """Return the `QTensor`, packed.

        Args:
            transposed: whether it shall be ``[out, in]``, as an embedding is.
        """
        turn = (lambda a: a.T) if transposed else (lambda a: a)
        axis, bits = int(transposed), self.spec.bits
        block = tuple(min(b, n) for b, n in zip(self.block, self.shape, strict=True))
        length = self.codes.shape[0]
        padded = padded_length(length, block[0], bits)
        codes = np.pad(self.codes, ((0, padded - length), (0, 0)))
        pack = layouts.pack_block(padded, bits, block[0])
        signed = self.spec.number_format.lowest < 0
        return QTensor(
            layouts.pack(jnp.asarray(turn(codes)), bits, axis, pack),
            _scales(self.scales, turn, transposed),
            _optional(self.zeros, turn, np.int8 if signed else np.uint8),
            _optional(self.offset, turn, np.float32),
            _optional(self.input_scale, turn, np.float32),
            _optional(_column(self.index), turn, np.int32),
            _optional(self.activation_scale, turn, np.float32),
            _optional(self.activation_zero, turn, None),
            spec=self.spec,
            axis=axis - 2,
            pack=pack,
            padding=padded - length,
            rows=None if self.index is None else length,
            block=block[::-1] if transposed else block,
            dtype=jnp.dtype(self.dtype),
            activation=self.activation,
        )

    @classmethod
    def of(cls, q: QTensor) -> "Unpacked":
        """Return the arrays of a matrix.

        Raises:
            UnsupportedError: it is no matrix, or binary-coded.
        """
        if q.ndim != 2:
            raise UnsupportedError(
                f"{q!r} has rank {q.ndim}; other libraries' formats hold matrices"
            )
        if q.spec.binary:
            raise UnsupportedError(
                f"{q!r} has a scale for every bit, which no other library's format has"
            )
        q = relayout(q, PLANAR)
        transposed = q.axis == -1
        turn = (lambda a: a.T) if transposed else (lambda a: a)
        codes = np.asarray(layouts.unpack(q.codes, q.spec.bits, q.axis % 2, q.pack))
        codes = turn(codes)[: q.stored_shape[q.axis]]
        scales = q.scales
        return cls(
            codes=np.ascontiguousarray(codes),
            scales=(
                _nested(scales, transposed)
                if isinstance(scales, QTensor)
                else _turned(scales, turn)
            ),
            spec=q.spec,
            block=q.blocks[::-1] if transposed else q.blocks,  # type: ignore[arg-type]
            dtype=np.dtype(q.dtype),
            zeros=_turned(q.zeros, turn),
            offset=_turned(q.offset, turn),
            index=None if q.input_index is None else _index(q),
            input_scale=_turned(q.input_scale, turn),
            activation=q.activation,
            activation_scale=_turned(q.activation_scale, turn),
            activation_zero=_turned(q.activation_zero, turn),
        )

    def grid(self) -> tuple[int, int]:
        """Return how many blocks lie along each axis."""
        rows, columns = (
            -(-n // b) for n, b in zip(self.shape, self.block, strict=True)
        )
        return rows, columns


def block_name(block: tuple[int, int], shape: tuple[int, int]) -> Block:
    """Return what `QuantSpec` calls blocks of ``(in, out)`` elements of a matrix."""
    rows, columns = block
    if columns == 1:
        return "channel" if rows >= shape[0] else rows
    if rows >= shape[0] and columns >= shape[1]:
        return "tensor"
    return (rows, columns)


def _nested(q: QTensor, transposed: bool) -> Unpacked:
    """Unpack scales that are quantized: as ``[in blocks, out blocks]``, too."""
    plain = Unpacked.of(q)
    return plain if (q.axis == -1) == transposed else swapped(plain)


def swapped(u: Unpacked) -> Unpacked:
    """Return a matrix of scales with its axes exchanged."""
    scales = u.scales
    return dataclasses.replace(
        u,
        codes=u.codes.T,
        scales=swapped(scales) if isinstance(scales, Unpacked) else scales.T,
        block=u.block[::-1],
        zeros=_turned(u.zeros, lambda a: a.T),
        offset=_turned(u.offset, lambda a: a.T),
    )


def _scales(scales: Any, turn: Any, transposed: bool) -> Any:
    if isinstance(scales, Unpacked):
        return scales.tensor(transposed)
    return jnp.asarray(turn(scales))


def _optional(a: np.ndarray | None, turn: Any, dtype: Any) -> Any:
    return None if a is None else jnp.asarray(turn(np.asarray(a, dtype)))


def _column(index: np.ndarray | None) -> np.ndarray | None:
    return None if index is None else index[:, None]


def _turned(a: Any, turn: Any) -> Any:
    return None if a is None else turn(np.asarray(a))


def _index(q: QTensor) -> np.ndarray:
    index = np.asarray(q.input_index)
    if index.size != q.stored_shape[q.axis] or q.rows != index.size:
        raise UnsupportedError(
            f"{q!r} stores {q.stored_shape[q.axis]} rows for {q.rows} channels (split "
            "channels); other libraries' formats have one row for each"
        )
    return index.reshape(-1)
