"""The GGUF container, version 2 and 3: keys, values and where the tensors lie.

Nothing in a file is believed: every length is checked against the file's size before
anything of that length is made.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxq.checkpoints.errors import CorruptError, MissingFileError, UnsupportedError
from jaxq.codecs.gguf_blocks import FLOAT_TYPES, TYPES

MAGIC = b"GGUF"
ALIGNMENT = 32
MOST = 2**22  # of keys, tensors or strings in a list
LONGEST = 2**20  # of a string that is kept
KEPT = 4096  # items of a list that are kept
DEEPEST = 4
STRING, LIST = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}
SCALARS |= {11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        type: of ggml, by number.
        shape: rows first, as NumPy has it.
        start: the byte of the file at which it begins.
        nbytes: its length.
    """

    type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a file says it holds, checked against its size.

    Attributes:
        path: of the file.
        size: in bytes.
        values: by key; long lists are left out.
        tensors: by their names in the file.
    """

    path: Path
    size: int
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_file(path: Path) -> GGUFFile:
    """Read and check everything but the numbers.

    Raises:
        CorruptError: the file is truncated or damaged.
        UnsupportedError: it holds a type of tensor that is not known.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise CorruptError(f"{path} ({size} bytes) is no GGUF file")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).parse()
    except OSError as error:
        raise MissingFileError(
            f"{path} cannot be read: {error.strerror or error}"
        ) from error


class _Parser:
    """Walks through the beginning of a file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def parse(self) -> GGUFFile:
        if self.bytes(4) != MAGIC:
            raise CorruptError(f"{self.path} is no GGUF file: it begins otherwise")
        version = self.number("I")
        if version not in (2, 3):
            raise UnsupportedError(
                f"{self.path} is GGUF version {version}; 2 and 3 (little endian) are "
                "read"
            )
        tensors, pairs = self.count("tensors"), self.count("keys")
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in values:
                raise self.corrupt(f"the key {key[:80]!a} is repeated")
            values[key] = self.value(self.number("I"), 0)
        found = dict(self.described(tensors))
        return GGUFFile(self.path, self.size, values, self.placed(found, values))

    def described(
        self, count: int
    ) -> Iterator[tuple[str, tuple[int, tuple[int, ...], int]]]:
        seen: set[str] = set()
        for _ in range(count):
            name, rank = self.string(), self.number("I")
            if name in seen:
                raise self.corrupt(f"the tensor {name[:80]!a} is repeated")
            seen.add(name)
            if not 1 <= rank <= 4:
                raise self.corrupt(f"tensor {name[:80]!a} has rank {rank}")
            shape = tuple(self.number("Q") for _ in range(rank))[::-1]
            yield name, (self.number("I"), shape, self.number("Q"))

    def placed(
        self,
        found: Mapping[str, tuple[int, tuple[int, ...], int]],
        values: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        align = values.get("general.alignment", ALIGNMENT)
        if type(align) is not int or not 1 <= align <= 2**20:
            raise self.corrupt(f"general.alignment is {align!r}")
        start = -(-self.at // align) * align
        tensors = {
            name: self.tensor(name, kind, shape, start + offset)
            for name, (kind, shape, offset) in found.items()
        }
        end = start
        for name, tensor in sorted(tensors.items(), key=lambda t: t[1].start):
            if tensor.start < end or tensor.start + tensor.nbytes > self.size:
                raise self.corrupt(
                    f"tensor {name[:80]!a} lies at bytes {tensor.start} to "
                    f"{tensor.start + tensor.nbytes}; there is room from {end} to "
                    f"{self.size}"
                )
            end = tensor.start + tensor.nbytes
        return tensors

    def tensor(
        self, name: str, kind: int, shape: tuple[int, ...], start: int
    ) -> Tensor:
        if kind in FLOAT_TYPES:
            elements, nbytes = 1, FLOAT_TYPES[kind][1].itemsize
        elif kind in TYPES:
            elements, nbytes = TYPES[kind].elements, TYPES[kind].nbytes
        else:
            known = [name for name, _ in FLOAT_TYPES.values()]
            known += [row.name for row in TYPES.values()]
            raise UnsupportedError(
                f"{self.path}: tensor {name[:80]!a} is of ggml type {kind}, which is "
                f"not known; known are {', '.join(known)}"
            )
        if shape[-1] % elements:
            raise self.corrupt(
                f"tensor {name[:80]!a} of shape {shape} is no whole blocks of "
                f"{elements}"
            )
        return Tensor(kind, shape, start, math.prod(shape) // elements * nbytes)

    def value(self, kind: int, depth: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == LIST:
            return self.list(depth)
        if kind not in SCALARS:
            raise self.corrupt(f"a value is of the unknown type {kind}")
        return self.number(SCALARS[kind])

    def list(self, depth: int) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        if depth == DEEPEST:
            raise self.corrupt("lists nest too deep")
        if kind in SCALARS:
            form = struct.Struct(f"<{SCALARS[kind]}")
            data = self.bytes(self.room(count * form.size))
            if count > KEPT:
                return None
            return [item for (item,) in form.iter_unpack(data)]
        if count > MOST:
            raise self.corrupt(f"a list has {count} items")
        items = [self.value(kind, depth + 1) for _ in range(count)]
        return items if count <= KEPT else None

    def string(self) -> str:
        length = self.room(self.number("Q"))
        if length > LONGEST:
            raise self.corrupt(f"a string has {length} bytes")
        return self.bytes(length).decode("utf-8", "replace")

    def count(self, what: str) -> int:
        count = self.number("Q")
        if count > min(MOST, self.size):
            raise self.corrupt(f"there should be {count} {what}")
        return count

    def number(self, form: str) -> Any:
        found = struct.Struct(f"<{form}")
        return found.unpack(self.bytes(found.size))[0]

    def bytes(self, length: int) -> bytes:
        start = self.at
        self.at += self.room(length)
        return self.data[start : self.at]

    def room(self, length: int) -> int:
        if length > self.size - self.at:
            raise self.corrupt(
                f"byte {self.at} should be followed by {length}, and there are "
                f"{self.size - self.at}"
            )
        return length

    def corrupt(self, why: str) -> CorruptError:
        return CorruptError(
            f"{self.path} ({self.size} bytes) is truncated or damaged: {why}; fetch it "
            "again"
        )


def header(
    values: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, tuple[int, ...], int]],
) -> bytes:
    """Return what comes before the tensors of a file, version 3.

    Args:
        values: strings, whole numbers (u32), floats (f32) or truth values.
        tensors: ggml type, shape (rows first) and bytes, in the order of their data,
            each of which begins at a multiple of `ALIGNMENT`.
    """
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        head += _string(key) + _value(value)
    position = 0
    for name, (kind, shape, size) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, position)
        position += -(-size // ALIGNMENT) * ALIGNMENT
    return head + bytes(-len(head) % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)
