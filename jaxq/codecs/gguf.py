"""GGUF files as llama.cpp writes them: names, rows and norms as Hugging Face has them.

llama.cpp moves rows of queries, keys and values, stacks experts, and adds 1 to the
norms of Gemma; here that is undone. The tokenizer is left to the Hugging Face folder.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.codecs.gguf_architectures import ROTARY, Architecture
from jaxq.codecs.gguf_blocks import FLOAT_TYPES, TYPES
from jaxq.codecs.gguf_file import GGUFFile, Tensor, read_file
from jaxq.codecs.gguf_names import Part, architecture_of, hf_names
from jaxq.codecs.gguf_rows import row_order
from jaxq.codecs.gguf_settings import read_numbers, to_config
from jaxq.codecs.source import fill
from jaxq.codecs.unpacked import Unpacked


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """The tensors of a GGUF file, by Hugging Face's names.

    Attributes:
        file: the open file.
        row: of its architecture.
        names: where the tensors lie, by Hugging Face's names.
        heads: query heads and key heads.
    """

    file: GGUFFile
    row: Architecture
    names: Mapping[str, Part]
    heads: tuple[int, int]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return type and shape of a tensor."""
        kind, shape = self.tensor(name).type, self.shape(name)
        if kind not in FLOAT_TYPES:
            return TYPES[kind].name, shape
        return FLOAT_TYPES[kind][0], shape[::-1] if self._turned(name) else shape

    def where(self, name: str) -> str:
        """Return file and tensor, for messages."""
        return f"{self.file.path}: {self.names[name].tensor!r}"

    def read(self, name: str) -> np.ndarray:
        """Return the numbers of a float tensor."""
        out = np.empty(self.shape(name), FLOAT_TYPES[self.tensor(name).type][1])
        self._fill(name, out)
        if name.endswith("norm.weight") and self.row.norm_offset:
            return out - np.asarray(self.row.norm_offset, out.dtype)
        out = self._in_order(name, out)
        return out.T if self._turned(name) else out

    def blocks(self, name: str) -> np.ndarray:
        """Return the blocks of a matrix: ``uint8[out, blocks, bytes]``."""
        kind = TYPES[self.tensor(name).type]
        rows, columns = self.shape(name)
        out = np.empty((rows, columns // kind.elements, kind.nbytes), np.uint8)
        self._fill(name, out)
        return self._in_order(name, out)

    def tensor(self, name: str) -> Tensor:
        """Return where a tensor lies, alone or with others."""
        return self.file.tensors[self.names[name].tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, of a matrix ``[out, in]``."""
        part, shape = self.names[name], self.tensor(name).shape
        if part.flat and len(shape) == 1:
            return (1, *shape)
        return shape if part.place is None else shape[1:]

    def _fill(self, name: str, out: np.ndarray) -> None:
        """Read a tensor's bytes: those of its place, where several lie together."""
        start = self.tensor(name).start + (self.names[name].place or 0) * out.nbytes
        fill(self.file.path, self.file.size, start, out)

    def _turned(self, name: str) -> bool:
        """Whether a float matrix is ``[in, out]`` in a checkpoint."""
        inner = name.startswith(f"{self.row.blocks}.")
        return self.row.in_out and inner and len(self.shape(name)) == 2

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        module = name.rpartition(".")[0]
        try:
            order = row_order(self.row, module, len(rows), self.heads)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file.path}: {error}") from error
        return rows if order is None else rows[np.argsort(order)]


@dataclasses.dataclass(frozen=True)
class GGUFReader:
    """Reads the quantized tensors of a GGUF file."""

    source: GGUFSource

    def parts(self, module: str) -> tuple[str, ...]:
        """Return a tensor that is quantized."""
        name = f"{module}.weight"
        if name not in self.source or self.source.tensor(name).type in FLOAT_TYPES:
            return ()
        return (name,)

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked:
        """Return codes and scales as they are."""
        name = f"{module}.weight"
        found = self.source.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self.source.where(name)} has the shape {found}; the config "
                f"makes it {shape}"
            )
        kind = TYPES[self.source.tensor(name).type]
        return kind.decode(self.source.blocks(name))

    def unused(self) -> Mapping[str, str]:
        """Nothing is left unread."""
        return {}


def open_gguf(
    path: Path, given: Mapping[str, Any] | None = None
) -> tuple[GGUFSource, dict[str, Any]]:
    """Return the tensors of a file, and its config as Hugging Face would write it.

    Args:
        path: of the file.
        given: the model's own config, where there is one: it has the word.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedError: the architecture, or a setting of it, is not known.
    """
    file = read_file(path)
    name = file.values.get("general.architecture")
    row = architecture_of(name, file.tensors, str(path))
    numbers = read_numbers(file, row)
    count = numbers["attention.head_count"]
    heads = count, numbers.get("attention.head_count_kv", count)
    source = GGUFSource(file, row, _names(file, row, numbers), heads)
    if given is not None:
        return source, dict(given)
    return source, to_config(file, row, numbers)


def _names(
    file: GGUFFile, row: Architecture, numbers: Mapping[str, Any]
) -> dict[str, Part]:
    """Return where the tensors lie, by Hugging Face's names."""
    names: dict[str, Part] = {}
    experts = numbers.get("expert_count", 0)
    for tensor, found in file.tensors.items():
        if tensor.removesuffix(".weight") in ROTARY:
            continue
        try:
            more = hf_names(tensor, found.shape, row, experts)
        except CheckpointError as error:
            raise type(error)(f"{file.path}: {error}") from error
        if again := names.keys() & more.keys():
            raise CheckpointError(f"{file.path} holds {min(again)!r} twice")
        names |= more
    return names
