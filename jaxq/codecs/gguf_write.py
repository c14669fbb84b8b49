"""Write GGUF files of Llama's relatives: Q8_0 or Q4_0, and what stays float."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.folder import write_config
from jaxq.codecs.gguf import ARCHITECTURES, INTERLEAVED, KEYS, LAYER, OPTIONAL, TOP
from jaxq.codecs.gguf_blocks import FLOAT_TYPES, TYPES
from jaxq.codecs.gguf_file import ALIGNMENT, header
from jaxq.codecs.integers import refuse_activation, refuse_extras, refuse_order
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec

NAME = "model.gguf"
# ggml's type -> what it holds, and what general.file_type calls a file mostly of it
TARGETS = {
    8: (QuantSpec("int8", 32, scale="float16"), 7),
    2: (QuantSpec("int4", 32, grid="full", scale="float16"), 2),
}
TYPE_OF = {spec.format: kind for kind, (spec, _) in TARGETS.items()}
_TOP = {theirs: ours for ours, theirs in TOP.items()}
_LAYER = {theirs: ours for ours, theirs in LAYER.items()}


class GGUFSink:
    """Writes a model as one GGUF file, tensor by tensor.

    Tensors are spooled to a file beside, because their places come before them.

    Args:
        folder: an empty one.
        config: the model's, as Hugging Face has it.
        kind: ggml's type for layers that are requantized.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], kind: int) -> None:
        self.folder, self.kind = folder, kind
        self.architecture = _architecture(config)
        self.values = _values(config, self.architecture)
        heads = int(config["num_attention_heads"])
        self.heads = heads, int(config.get("num_key_value_heads") or heads)
        self.tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.spool = (folder / "data.partial").open("wb+")

    def quantized(self, module: str, w: Unpacked) -> str:
        """Write a quantized layer; return a note.

        Raises:
            UnsupportedError: the format cannot express it.
        """
        refuse_extras(w)
        refuse_order(w)
        kind = TYPE_OF.get(w.spec.format)
        encode = None if kind is None else TYPES[kind].encode
        if kind is None or encode is None:
            raise UnsupportedError(
                f"GGUF is written with Q8_0 and Q4_0, and it is {w.spec.describe()}"
            )
        blocks = self._in_order(module, encode(w))
        self._add(f"{module}.weight", kind, w.shape[::-1], blocks.tobytes())
        return refuse_activation(w)

    def floating(self, name: str, values: np.ndarray, is_layer: bool) -> None:
        """Write a float tensor; norms and biases as float32, which ggml asks for."""
        del is_layer
        if values.ndim == 1:
            values = values.astype(np.float32)
        kinds = {dtype: kind for kind, (_, dtype) in FLOAT_TYPES.items()}
        values = self._in_order(name, np.ascontiguousarray(values))
        self._add(name, kinds[values.dtype], values.shape, values.tobytes())

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize a layer with."""
        del dtype
        if shape[0] % 32:
            raise UnsupportedError(f"{shape[0]} channels are no whole blocks of 32")
        return TARGETS[self.kind][0]

    def close(self, config: Mapping[str, Any]) -> None:
        """Write the file, and a config beside it."""
        values = self.values | {"general.file_type": TARGETS[self.kind][1]}
        self.spool.seek(0)
        with (self.folder / NAME).open("wb") as file:
            file.write(header(values, self.tensors))
            shutil.copyfileobj(self.spool, file, 2**24)
        self.spool.close()
        (self.folder / "data.partial").unlink()
        write_config(self.folder, config)

    def _add(self, name: str, kind: int, shape: tuple[int, ...], data: bytes) -> None:
        self.tensors[_gguf_name(name)] = kind, shape, len(data)
        self.spool.write(data)
        self.spool.write(bytes(-len(data) % ALIGNMENT))

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Interleave the rotary halves of query and key rows, as llama.cpp does."""
        found = re.search(r"\.([qk])_proj\b", name)
        if self.architecture not in INTERLEAVED or not found:
            return rows
        heads = self.heads[0 if found[1] == "q" else 1]
        order = np.arange(len(rows)).reshape(heads, 2, -1).swapaxes(1, 2)
        return rows[order.reshape(-1)]


def _architecture(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind == "mistral" and config.get("sliding_window") is None:
        return "llama"
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"GGUF is written for {', '.join(ARCHITECTURES)} (and mistral without a "
            f"sliding window), not for {kind!r}"
        )
    return str(kind)


def _values(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UnsupportedError(
            f"GGUF is not written for rotary angles scaled as {scaling!r}"
        )
    known = {"rope_theta": rope.get("rope_theta", 10_000.0), **config}
    values: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
        f"{architecture}.vocab_size": int(config["vocab_size"]),
    }
    for key, (name, kind) in KEYS.items():
        value = known.get(key)
        if value is None and key not in OPTIONAL:
            raise UnsupportedError(f"config.json has no {key!r}, which GGUF needs")
        if value is not None:
            values[f"{architecture}.{name}"] = kind(value)
    head = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
    for name in ("attention.key_length", "attention.value_length"):
        values[f"{architecture}.{name}"] = int(head)
    values[f"{architecture}.rope.dimension_count"] = int(head)
    return values


def _gguf_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if not layer or layer[2] not in _LAYER:
        raise UnsupportedError(f"GGUF has no name for {name!r}")
    return f"blk.{layer[1]}.{_LAYER[layer[2]]}.{leaf}"
