"""bitsandbytes checkpoints: nf4 and fp4, plain or double quantized, and LLM.int8().

4 bits: two codes to a byte, the **first in the high** nibble, of the row-major
``[out, in]`` matrix cut into blocks of (mostly) 64; ``absmax`` of each block, itself
maybe uint8 codes of a signed dynamic map in blocks of 256; a code book; and the rest as
JSON in a uint8 tensor. Where rows are no whole blocks, blocks run across them, which no
`QTensor` expresses. int8: ``weight`` int8 and ``SCB``, the largest magnitude of each
row: ``w = q · SCB / 127``.

Dettmers et al. 2022, arXiv:2208.07339; 2023, arXiv:2305.14314.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxq.checkpoints import strict_json
from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs import settings
from jaxq.codecs.base import Dense
from jaxq.codecs.source import FLOATS, Source, check, need, scalar
from jaxq.codecs.unpacked import Unpacked, block_name, swapped
from jaxq.formats import FORMATS
from jaxq.formats.codebook import CodebookFormat
from jaxq.spec import QuantSpec

KINDS = {"nf4": "nf4", "fp4": "fp4_bnb"}
STATE = "quant_state.bitsandbytes__"
SUFFIXES = (
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *(STATE + kind for kind in KINDS),
)
INT8 = ("weight", "SCB", "weight_format")
DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
}
LONGEST_STATE = 10_000


@dataclasses.dataclass(frozen=True)
class State:
    """What the JSON of a 4-bit weight says.

    Attributes:
        kind: ``nf4`` or ``fp4``.
        blocksize: elements per scale.
        dtype: of the matrix it stands for.
        nested: scales per scale of scales; None without.
        offset: what is added to the scales.
    """

    kind: str
    blocksize: int
    dtype: np.dtype
    nested: int | None
    offset: float


@dataclasses.dataclass(frozen=True)
class BitsAndBytesReader:
    """Reads bitsandbytes layers, whose tensors say which kind they are.

    Attributes:
        source: the tensors.
        threshold: from which magnitude on a column of an activation stays float.
    """

    source: Source
    threshold: float

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer."""
        name = f"{module}.weight"
        if f"{module}.SCB" in self.source:
            names = [f"{module}.{suffix}" for suffix in INT8]
        elif f"{name}.absmax" in self.source:
            names = [name, *(f"{name}.{suffix}" for suffix in SUFFIXES)]
        else:
            return ()
        return tuple(name for name in names if name in self.source)

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked | Dense:
        """Return a layer's codes and scales as they are."""
        if f"{module}.SCB" in self.source:
            return self._int8(module, shape)
        return self._four(f"{module}.weight", shape)

    def unused(self) -> Mapping[str, str]:
        """Nothing is left unread."""
        return {}

    def _int8(self, module: str, shape: tuple[int, int]) -> Unpacked:
        name = f"{module}.weight_format"
        if name in self.source and (order := scalar(self.source, name, ("U8",))):
            raise UnsupportedError(
                f"{self.source.where(name)} is {order}, the tiling of an old GPU "
                "kernel; load and save it with a current bitsandbytes (format 0)"
            )
        codes = need(self.source, f"{module}.weight", ("I8",), shape).view(np.uint8).T
        largest = need(self.source, f"{module}.SCB", ("F32",), (shape[0],))
        scales = (largest / np.float32(127))[None]
        spec = QuantSpec("int8", "channel")
        kept = self.threshold if self.threshold > 0 else None
        return Unpacked(
            codes,
            scales,
            spec,
            (shape[1], 1),
            None,
            activation=QuantSpec("int8", "token", outliers=kept),
        )

    def _four(self, name: str, shape: tuple[int, int]) -> Unpacked | Dense:
        columns, rows = shape
        state = self._state(name, shape)
        count = rows * columns
        codes = self._codes(name, count)
        book = need(self.source, f"{name}.quant_map", ("F32",), (16,))
        kind = FORMATS[KINDS[state.kind]]
        blocks = -(-count // state.blocksize)
        if rows % state.blocksize:
            absmax = _values(self._absmax(name, state, blocks, shape))
            flat = np.repeat(absmax.reshape(-1), state.blocksize)[:count]
            values = (book[codes] * flat).astype(state.dtype)
            why = f"blocks of {state.blocksize} run across rows of {rows}"
            return Dense(values.reshape(shape), why)
        scales = self._absmax(name, state, blocks, shape)
        if not _same_table(kind, book):
            flat = np.repeat(_values(scales).reshape(-1), state.blocksize)
            values = (book[codes] * flat).astype(state.dtype)
            return Dense(values.reshape(shape), "its code book is not the usual one")
        if isinstance(scales, Unpacked):
            inner: Any = scales.spec
            scales = swapped(scales)
        else:
            scales, inner = scales.T, "float32"
        spec = QuantSpec(kind.name, state.blocksize, scale=inner)
        block = (state.blocksize, 1)
        return Unpacked(codes.reshape(shape).T, scales, spec, block, state.dtype)

    def _codes(self, name: str, count: int) -> np.ndarray:
        """Return the codes, one per byte, of storage of whatever dtype."""
        check(self.source, name, ("U8", "I8", *FLOATS[:3]))
        stored = self.source.read(name)
        data = stored.reshape(-1).view(np.uint8)
        need_bytes, item = -(-count // 2), stored.dtype.itemsize
        if len(data) != -(-need_bytes // item) * item:
            raise CheckpointError(
                f"{self.source.where(name)} holds {len(data)} bytes; config.json makes "
                f"it {need_bytes}"
            )
        codes = np.empty((len(data), 2), np.uint8)
        codes[:, 0], codes[:, 1] = data >> 4, data & 15
        return codes.reshape(-1)[:count]

    def _absmax(
        self, name: str, state: State, blocks: int, shape: tuple[int, int]
    ) -> "np.ndarray | Unpacked":
        """Return scales ``[out, blocks of a row]``: float32, or quantized in turn.

        Where blocks of scales are no rectangle of that matrix, they are decoded.
        """
        per_row = -(-shape[1] // state.blocksize)
        whole = shape[1] % state.blocksize == 0
        grid = (shape[0], per_row) if whole else (1, blocks)
        if state.nested is None:
            # transformers may save them as a matrix, in the model's dtype
            found = self._flat(f"{name}.absmax", FLOATS, blocks)
            return found.astype(np.float32).reshape(grid)
        codes = self._flat(f"{name}.absmax", ("U8",), blocks).reshape(grid)
        book = need(self.source, f"{name}.nested_quant_map", ("F32",), (256,))
        many = -(-blocks // state.nested)
        outer = self._flat(f"{name}.nested_absmax", FLOATS, many)
        outer = outer.astype(np.float32)
        block = _rectangle(grid, state.nested)
        usual = _same_table(FORMATS["dynamic8"], book)
        offset = np.float32(state.offset)
        if block is None or not usual:
            spread = np.repeat(outer, state.nested)[:blocks].reshape(grid)
            return book[codes] * spread + offset
        tiles = tuple(-(-n // b) for n, b in zip(grid, block, strict=True))
        name_of = block_name(block, grid)
        spec = QuantSpec("dynamic8", name_of, center=True)
        return Unpacked(
            codes,
            outer.reshape(tiles),
            spec,
            block,
            np.dtype("float32"),
            offset=np.full((1, 1), offset),
        )

    def _flat(self, name: str, dtypes: tuple[str, ...], count: int) -> np.ndarray:
        """Return a tensor of ``count`` numbers, whatever its shape."""
        check(self.source, name, dtypes)
        shape = self.source.entry(name)[1]
        if math.prod(shape) != count:
            raise CheckpointError(
                f"{self.source.where(name)} has the shape {shape}; config.json makes "
                f"it {count} numbers"
            )
        return self.source.read(name).reshape(-1)

    def _state(self, name: str, shape: tuple[int, int]) -> State:
        kinds = [kind for kind in KINDS if f"{name}.{STATE}{kind}" in self.source]
        if len(kinds) != 1:
            raise CheckpointError(
                f"{name!r} has {len(kinds)} quant states of {', '.join(KINDS)}; it "
                "needs one; the checkpoint is incomplete"
            )
        stored = f"{name}.{STATE}{kinds[0]}"
        check(self.source, stored, ("U8",))
        if math.prod(self.source.entry(stored)[1]) > LONGEST_STATE:
            raise CheckpointError(f"{self.source.where(stored)} is too long a state")
        where = self.source.where(stored)
        data = strict_json.parse(self.source.read(stored).tobytes(), where)
        if data.get("quant_type") != kinds[0] or data.get("shape") != list(shape):
            raise CheckpointError(
                f"{where} says {strict_json.shorten(data.get('quant_type'))} of shape "
                f"{strict_json.shorten(data.get('shape'))}, but it should be "
                f"{kinds[0]} of {list(shape)}"
            )
        dtype = settings.choice(data, "dtype", tuple(DTYPES))
        nested = None
        if f"{name}.nested_absmax" in self.source:
            nested = settings.integer(data, "nested_blocksize", range(1, 2**31))
        offset = data.get("nested_offset", 0.0)
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise CheckpointError(
                f"{where}: nested_offset is {strict_json.shorten(offset)}, no number"
            )
        size = settings.integer(data, "blocksize", range(1, 2**31))
        return State(kinds[0], size, DTYPES[dtype], nested, float(offset))


def _rectangle(grid: tuple[int, int], count: int) -> tuple[int, int] | None:
    """Return the tile that ``count`` consecutive elements are, if they are one."""
    _, columns = grid
    if columns % count == 0:
        return 1, count
    if count % columns == 0:
        return count // columns, columns
    return None


def _values(scales: "np.ndarray | Unpacked") -> np.ndarray:
    """Return scales as float32."""
    if isinstance(scales, np.ndarray):
        return scales
    return np.asarray(scales.tensor().dequantize(np.float32))


def _same_table(kind: Any, book: np.ndarray) -> bool:
    return isinstance(kind, CodebookFormat) and bool(
        (np.asarray(kind.table, np.float32) == book).all()
    )


def read(config: Mapping[str, Any], source: Source) -> BitsAndBytesReader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``bitsandbytes``.

    Raises:
        CheckpointError: the config is damaged.
    """
    threshold = config.get("llm_int8_threshold", 6.0)
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold < math.inf:
        raise CheckpointError(
            f"quantization_config: 'llm_int8_threshold' is "
            f"{strict_json.shorten(threshold)}; it must be a number from 0"
        )
    return BitsAndBytesReader(source, float(threshold))
