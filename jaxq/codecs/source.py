"""The tensors of a folder by name, whatever their dtype; each is read when needed."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import CheckpointError, CorruptError, MissingFileError
from jaxq.checkpoints.huggingface import locate
from jaxq.checkpoints.safetensors import Entry, Header

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "U16": np.dtype("uint16"),
    "I16": np.dtype("int16"),
    "U32": np.dtype("uint32"),
    "I32": np.dtype("int32"),
    "U64": np.dtype("uint64"),
    "I64": np.dtype("int64"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
FLOATS = ("F16", "BF16", "F32", "F64")


class Source(Protocol):
    """Where a reader finds tensors: safetensors, or a GGUF file."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype (as safetensors names it) and shape; nothing is read."""

    def where(self, name: str) -> str:
        """Return file and tensor, for messages."""

    def read(self, name: str) -> np.ndarray:
        """Return the numbers, as stored."""


def parts_of(
    source: Source, module: str, suffixes: Iterable[str], sign: str
) -> tuple[str, ...]:
    """Return the tensors of a layer that are there; () when it is float.

    Args:
        source: where they are.
        module: the layer's name.
        suffixes: of the tensors that it may have.
        sign: the suffix of the one without which it is not quantized.
    """
    if f"{module}.{sign}" not in source:
        return ()
    names = (f"{module}.{suffix}" for suffix in suffixes)
    return tuple(name for name in names if name in source)


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """The safetensors files of a folder.

    Attributes:
        headers: the header of the file that holds each tensor.
        metadata: what the headers say besides, by key.
    """

    headers: Mapping[str, Header]

    @classmethod
    def of(cls, folder: Path) -> "SafetensorsSource":
        """Open a folder: only headers are read, and checked against the files' sizes.

        Raises:
            FileNotFoundError: there are no safetensors, or a shard is missing.
            CheckpointError: a file is damaged.
        """
        return cls(locate(folder))

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers say besides tensors."""
        found: dict[str, str] = {}
        for header in {
            header.path: header for header in self.headers.values()
        }.values():
            found |= header.metadata
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a tensor."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def where(self, name: str) -> str:
        """Return file and tensor, for messages."""
        return f"{self.headers[name].path}: {name!r}"

    def read(self, name: str) -> np.ndarray:
        """Return the numbers of a tensor, at the cost of that tensor.

        Raises:
            CheckpointError: the dtype is none that is known, or the file changed.
        """
        header, entry = self.headers[name], self._entry(name)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.where(name)} is {entry.dtype}, which no known format stores; "
                f"known are {', '.join(DTYPES)}"
            )
        out = np.empty(entry.shape, DTYPES[entry.dtype])
        fill(header.path, header.size, header.start + entry.start, out)
        return out

    def _entry(self, name: str) -> Entry:
        if name not in self.headers:
            raise missing(name)
        return self.headers[name].entries[name]


def fill(path: Path, size: int, start: int, out: np.ndarray) -> None:
    """Read a file from byte ``start`` into ``out``; it must still have ``size`` bytes.

    Raises:
        MissingFileError: the file cannot be read any more.
        CorruptError: its size is another.
    """
    try:
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            file.seek(start)
            left = out.reshape(-1).view(np.uint8).data
            while len(left) and found == size and (got := file.readinto(left)):
                left = left[got:]
    except OSError as error:
        raise MissingFileError(
            f"{path} can no longer be read: {error.strerror or error}"
        ) from error
    if found != size or len(left):
        raise CorruptError(
            f"{path} changed since it was opened: it had {size} bytes, and has {found}"
            "; leave the model alone while it is read"
        )


def need(
    source: Source, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
) -> np.ndarray:
    """Read a tensor that must have one of ``dtypes`` and one of ``shapes``.

    Raises:
        CheckpointError: naming the tensor, what it is and what it should be.
    """
    check(source, name, dtypes, *shapes)
    return source.read(name)


def check(
    source: Source, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
) -> None:
    """Raise `CheckpointError` unless the tensor has such a dtype and such a shape."""
    if name not in source:
        raise missing(name)
    dtype, shape = source.entry(name)
    if dtype not in dtypes:
        raise CheckpointError(
            f"{source.where(name)} is {dtype}; it should be {' or '.join(dtypes)}"
        )
    if shapes and shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise CheckpointError(
            f"{source.where(name)} has the shape {shape}; config.json makes it {wanted}"
        )


def missing(name: str) -> CheckpointError:
    """Return what to raise where a part of a weight is missing."""
    return CheckpointError(
        f"there is no {name!r}, though other parts of the same weight are there; the "
        "checkpoint is incomplete, or of another format than its config says"
    )


def scalar(source: Source, name: str, dtypes: tuple[str, ...]) -> Any:
    """Return the one number of a tensor that must hold just one."""
    check(source, name, dtypes)
    shape = source.entry(name)[1]
    if math.prod(shape) != 1:
        raise CheckpointError(
            f"{source.where(name)} has the shape {shape}; it should be one number"
        )
    return source.read(name).reshape(())[()]
