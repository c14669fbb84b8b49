"""One safetensors file: written as a stream, read through a memory map.

The format: 8 bytes, the length of the header (little endian); the header, JSON, from
tensor name to dtype, shape and byte range; the bytes. The safetensors library's NumPy
reader knows no 8-bit floats, and its writer wants all tensors of a file at once.
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import strict_json
from jaxq.checkpoints.dtypes import SAFETENSORS_NAMES
from jaxq.checkpoints.errors import CorruptError, MismatchError
from jaxq.checkpoints.manifest import DataFile

MAX_HEADER = 100 * 2**20
CHUNK = 16 * 2**20
_ITEM_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8},
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the header says of one tensor; ``start`` and ``end`` count from the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @classmethod
    def of(cls, tensor: jax.ShapeDtypeStruct, start: int) -> "Entry":
        """Return how a tensor is stored at ``start``."""
        dtype = np.dtype(tensor.dtype)
        name, shape = SAFETENSORS_NAMES[dtype.name], tuple(tensor.shape)
        if name is None:
            name, shape = "U8", (*shape, dtype.itemsize)
        return cls(name, shape, start, start + math.prod(tensor.shape) * dtype.itemsize)


def layout(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
    """Return where each tensor goes: the widest items first, so all are aligned."""
    entries: dict[str, Entry] = {}
    position = 0
    for name in sorted(
        tensors, key=lambda n: (-np.dtype(tensors[n].dtype).itemsize, n)
    ):
        entries[name] = Entry.of(tensors[name], position)
        position = entries[name].end
    return entries


def write(
    path: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    fetch: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = {"format": "jaxq"},
) -> DataFile:
    """Write a file, holding one tensor in memory at a time.

    Args:
        path: of the file.
        tensors: what goes into it.
        fetch: returns the numbers of a tensor.
        metadata: what the header says besides, text by key.

    Returns:
        The size and SHA-256 of what was written.
    """
    entries = layout(tensors)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(entries, fetch, metadata):
            file.write(piece)
            digest.update(piece)
        return DataFile(file.tell(), digest.hexdigest())


def _pieces(
    entries: Mapping[str, Entry],
    fetch: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> Iterable[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        offsets = [entry.start, entry.end]
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, entry in entries.items():
        array = np.ascontiguousarray(fetch(name))
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = array.reshape(-1).view(np.uint8).data
        if len(data) != entry.end - entry.start:
            raise MismatchError(
                f"{name!r} changed while it was saved: {len(data)} bytes, announced "
                f"were {entry.end - entry.start}"
            )
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says it holds, checked against its size.

    Attributes:
        path: of the file.
        size: of the file in bytes.
        start: the byte at which the data begin.
        entries: the tensors by name.
        metadata: what the header says besides, text by key.
    """

    path: Path
    size: int
    start: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check the header of a file; no data is read.

    Raises:
        CorruptError: the file is truncated, or its header is damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        announced = int.from_bytes(length, "little")
        room = min(size - 8, MAX_HEADER)
        if len(length) < 8 or announced > room:
            raise CorruptError(
                f"{path} ({size} bytes) is truncated or no safetensors file: "
                f"its header would have {announced} bytes, and there is room for "
                f"{max(room, 0)}; fetch or save it again"
            )
        where = f"the header of {path} ({size} bytes)"
        parsed = strict_json.parse(file.read(announced), where)
    metadata = _metadata(parsed.pop("__metadata__", {}), path)
    entries = {n: _entry(f"{path}: tensor {n!a}", e) for n, e in parsed.items()}
    header = Header(path, size, 8 + announced, entries, metadata)
    _check_ranges(header)
    return header


class Reader:
    """An open safetensors file, mapped into memory.

    Args:
        path: of the file.

    Raises:
        CorruptError: the file is truncated, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.size, self.entries, self._data = header.size, header.entries, header.start
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)

    def __getitem__(self, name: str) -> np.ndarray:
        """The bytes of a tensor as a read-only uint8 view of the file."""
        entry = self.entries[name]
        size = entry.end - entry.start
        return np.frombuffer(self._map, np.uint8, size, self._data + entry.start)


def _metadata(data: Any, path: Path) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise CorruptError(
            f"{path}: __metadata__ is {strict_json.shorten(data)}, not text by key; "
            "fetch or save it again"
        )
    return data


def _entry(where: str, data: Any) -> Entry:
    if not isinstance(data, dict):
        raise CorruptError(f"{where} is {strict_json.shorten(data)}, not an object")
    dtype = strict_json.get(data, "dtype", str, where)
    shape = strict_json.get_sizes(data, "shape", where)
    offsets = strict_json.get_sizes(data, "data_offsets", where)
    if dtype not in _ITEM_BITS or len(offsets) != 2:
        raise CorruptError(
            f"{where} has dtype {strict_json.shorten(dtype)} and data_offsets "
            f"{strict_json.shorten(offsets)}; fetch or save it again"
        )
    bits = _ITEM_BITS[dtype] * math.prod(shape)
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CorruptError(
            f"{where} ({dtype}, {strict_json.shorten(shape)}) needs "
            f"{strict_json.shorten(-(-bits // 8))} bytes, but its data_offsets are "
            f"{strict_json.shorten(offsets)}; fetch or save it again"
        )
    return Entry(dtype, shape, *offsets)


def _check_ranges(header: Header) -> None:
    """Raise unless the tensors fill the data exactly, without gap or overlap."""
    where, room = f"{header.path} ({header.size} bytes)", header.size - header.start
    position = 0
    for name, entry in sorted(
        header.entries.items(), key=lambda e: (e[1].start, e[1].end)
    ):
        if entry.start != position:
            raise CorruptError(
                f"{where}: tensor {name!a} starts at byte {entry.start}, but "
                f"the one before it ends at {position}; fetch or save it again"
            )
        position = entry.end
    if position != room:
        raise CorruptError(
            f"{where} is truncated or has something appended: its tensors need "
            f"{position} bytes, and it holds {room}; fetch or save it again"
        )
