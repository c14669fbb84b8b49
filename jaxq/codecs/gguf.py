"""GGUF files of Llama's relatives: names, permuted rows, shifted norms and config.

llama.cpp interleaves the two rotary halves of the query and key rows of architecture
``llama``, and adds 1 to the norms of Gemma; here that is undone. The tokenizer is left
to the Hugging Face folder.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.gguf_architectures import (
    ARCHITECTURES,
    OPTIONAL,
    ROTARY,
    TOP,
    Architecture,
    query_scalar,
)
from jaxq.codecs.gguf_blocks import FLOAT_TYPES, TYPES
from jaxq.codecs.gguf_file import GGUFFile, Tensor, read_file
from jaxq.codecs.source import fill
from jaxq.codecs.unpacked import Unpacked


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """The tensors of a GGUF file, by Hugging Face's names.

    Attributes:
        file: the open file.
        names: of each tensor in the file, by Hugging Face's.
        heads: query heads and key heads whose rows are interleaved, or None.
        norm_offset: what norms' weights hold more than Hugging Face's.
    """

    file: GGUFFile
    names: Mapping[str, str]
    heads: tuple[int, int] | None
    norm_offset: float

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return type and shape of a tensor."""
        tensor = self.tensor(name)
        floats = FLOAT_TYPES.get(tensor.type)
        return floats[0] if floats else TYPES[tensor.type].name, tensor.shape

    def where(self, name: str) -> str:
        """Return file and tensor, for messages."""
        return f"{self.file.path}: {self.names[name]!r}"

    def read(self, name: str) -> np.ndarray:
        """Return the numbers of a float tensor."""
        tensor = self.tensor(name)
        out = np.empty(tensor.shape, FLOAT_TYPES[tensor.type][1])
        fill(self.file.path, self.file.size, tensor.start, out)
        if name.endswith("norm.weight") and self.norm_offset:
            return out - np.asarray(self.norm_offset, out.dtype)
        return self._in_order(name, out)

    def blocks(self, name: str) -> np.ndarray:
        """Return the blocks of a matrix: ``uint8[out, blocks, bytes]``."""
        tensor = self.tensor(name)
        kind = TYPES[tensor.type]
        rows, columns = tensor.shape
        out = np.empty((rows, columns // kind.elements, kind.nbytes), np.uint8)
        fill(self.file.path, self.file.size, tensor.start, out)
        return self._in_order(name, out)

    def tensor(self, name: str) -> Tensor:
        """Return where a tensor lies."""
        return self.file.tensors[self.names[name]]

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        if self.heads is None or not re.search(r"\.[qk]_proj\.", name):
            return rows
        heads = self.heads[0 if ".q_proj." in name else 1]
        if len(rows) % (2 * heads):
            raise CheckpointError(
                f"{self.where(name)} has {len(rows)} rows, which are no {heads} heads "
                "of two halves"
            )
        order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2)
        return rows[order.reshape(-1)]


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
        found = self.source.tensor(name)
        if found.shape != shape:
            raise CheckpointError(
                f"{self.source.where(name)} has the shape {found.shape}; the config "
                f"makes it {shape}"
            )
        return TYPES[found.type].decode(self.source.blocks(name))

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
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: general.architecture is {str(name)[:80]!a}; GGUF files are read "
            f"of {', '.join(ARCHITECTURES)}"
        )
    kind = ARCHITECTURES[name]
    config = _numbers(file, name, kind)
    names = {
        _hf_name(tensor, path, kind): tensor
        for tensor in file.tensors
        if tensor.removesuffix(".weight") not in ROTARY
    }
    heads = None
    if kind.interleaved:
        count = config["num_attention_heads"]
        heads = count, config.get("num_key_value_heads", count)
    source = GGUFSource(file, names, heads, kind.norm_offset)
    if given is not None:
        return source, dict(given)
    return source, config | _others(file, name, kind, config)


def _numbers(file: GGUFFile, name: str, kind: Architecture) -> dict[str, Any]:
    """Return the settings that are numbers."""
    config: dict[str, Any] = {}
    for key, (theirs, type_) in kind.keys.items():
        value = file.values.get(f"{name}.{theirs}")
        if value is None and (key in OPTIONAL or key in kind.extra):
            continue
        if value == 0 and key in kind.extra:
            config[key] = None  # llama.cpp's word for a window or a cap that is not
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (type_ is int and type(value) is not int) or value <= 0:
            raise CheckpointError(
                f"{file.path}: {name}.{theirs} is {str(value)[:80]!a}; it must "
                "be a positive number"
            )
        config[key] = value
    return config


def _others(
    file: GGUFFile, name: str, kind: Architecture, numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what else a config says."""
    config: dict[str, Any] = {"architectures": [kind.name]}
    config["model_type"] = kind.model_type
    scaling = file.values.get(f"{name}.rope.scaling.type", "none")
    tables = [table for table in ROTARY if f"{table}.weight" in file.tensors]
    if scaling != "none" or tables:
        raise UnsupportedError(
            f"{file.path} scales its rotary angles ({str(scaling)[:40]!a}); put the "
            "model's config.json beside it, which says how"
        )
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix 'token_embd.weight'")
    config["vocab_size"] = table.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if name == "llama" and "blk.0.attn_q.bias" in file.tensors:
        config["attention_bias"] = True
    config |= _rotary_width(file, name, numbers)
    if kind.widest is not None:
        config["query_pre_attn_scalar"] = query_scalar(kind, numbers)
    eos = file.values.get("tokenizer.ggml.eos_token_id")
    return config if eos is None else config | {"eos_token_id": eos}


def _rotary_width(
    file: GGUFFile, name: str, numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Return which part of a head turns, where it is not all of it."""
    width = file.values.get(f"{name}.rope.dimension_count")
    heads, hidden = numbers["num_attention_heads"], numbers["hidden_size"]
    head = numbers.get("head_dim", hidden // heads)
    if type(width) is not int or width == head:
        return {}
    if name != "phi3" or not 0 < width < head:
        raise UnsupportedError(
            f"{file.path}: {name}.rope.dimension_count is {width}, and heads are "
            f"{head} wide; only phi3 turns a part of a head"
        )
    return {"partial_rotary_factor": width / head}


def _hf_name(name: str, path: Path, kind: Architecture) -> str:
    stem, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem)
    if stem in TOP and leaf == "weight":
        return f"{TOP[stem]}.{leaf}"
    if layer and layer[2] in kind.layer and leaf in ("weight", "bias"):
        return f"model.layers.{int(layer[1])}.{kind.layer[layer[2]]}.{leaf}"
    raise UnsupportedError(
        f"{path} holds the tensor {name[:80]!a}, which no {kind.name} has"
    )
