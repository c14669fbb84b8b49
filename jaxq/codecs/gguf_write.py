"""Write GGUF files of Llama's relatives: Q8_0 or Q4_0, and what stays float."""

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.folder import SPOOL, write_config
from jaxq.codecs.gguf_architectures import (
    ARCHITECTURES,
    CAPS,
    OPTIONAL,
    TOP,
    Architecture,
    query_scalar,
)
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
USUAL_PATTERN = 6  # of Gemma 3: which layer of so many sees everything
_TOP = {theirs: ours for ours, theirs in TOP.items()}


class GGUFSink:
    """Writes a model as one GGUF file, tensor by tensor.

    Tensors are spooled to a file beside, because their places come before them.

    Args:
        folder: an empty one.
        config: the model's, as Hugging Face has it.
        kind: ggml's type for layers that are requantized.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], kind: int) -> None:
        from jaxq.models import find_family

        self.folder, self.kind = folder, kind
        # a file that left out a setting would get llama.cpp's, which may be another
        config = {**find_family(config).defaults, **config}
        name = _architecture(config)
        self.architecture = ARCHITECTURES[name]
        self.values = _values(config, name, self.architecture)
        self.names = {theirs: ours for ours, theirs in self.architecture.layer.items()}
        heads = int(config["num_attention_heads"])
        self.heads = heads, int(config.get("num_key_value_heads") or heads)
        self.tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.spool = (folder / SPOOL).open("wb+")

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
        if name.endswith("norm.weight"):
            values = values + np.float32(self.architecture.norm_offset)
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
        (self.folder / SPOOL).unlink()
        write_config(self.folder, config)

    def release(self) -> None:
        """Let go of what is open, whatever happened; more than once if need be."""
        with contextlib.suppress(OSError):  # a full disk was told of already
            self.spool.close()

    def _add(self, name: str, kind: int, shape: tuple[int, ...], data: bytes) -> None:
        self.tensors[self._gguf_name(name)] = kind, shape, len(data)
        self.spool.write(data)
        self.spool.write(bytes(-len(data) % ALIGNMENT))

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Interleave the rotary halves of query and key rows, as llama.cpp does."""
        found = re.search(r"\.([qk])_proj\b", name)
        if not self.architecture.interleaved or not found:
            return rows
        heads = self.heads[0 if found[1] == "q" else 1]
        order = np.arange(len(rows)).reshape(heads, 2, -1).swapaxes(1, 2)
        return rows[order.reshape(-1)]

    def _gguf_name(self, name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        if stem in _TOP:
            return f"{_TOP[stem]}.{leaf}"
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if not layer or layer[2] not in self.names:
            raise UnsupportedError(f"GGUF has no name for {name!r}")
        return f"blk.{layer[1]}.{self.names[layer[2]]}.{leaf}"


def _architecture(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind == "mistral" and config.get("sliding_window") is None:
        return "llama"
    for name, row in ARCHITECTURES.items():
        if row.model_type == kind:
            return name
    raise UnsupportedError(
        f"GGUF is written for {', '.join(ARCHITECTURES)} (and mistral without a "
        f"sliding window), not for {kind!r}"
    )


def _values(config: Mapping[str, Any], name: str, kind: Architecture) -> dict[str, Any]:
    known = {"rope_theta": _theta(config, kind.theta), **config}
    values: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "model",
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
        f"{name}.vocab_size": int(config["vocab_size"]),
    }
    for key, (theirs, number) in kind.keys.items():
        value = known.get(key)
        if value is None and not (key in OPTIONAL or key in kind.extra):
            raise UnsupportedError(f"config.json has no {key!r}, which GGUF needs")
        if value is not None:
            values[f"{name}.{theirs}"] = number(value)
    head = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
    for theirs in ("attention.key_length", "attention.value_length"):
        values[f"{name}.{theirs}"] = int(head)
    part = known.get("partial_rotary_factor") or _rope(config).get(
        "partial_rotary_factor", 1.0
    )
    values[f"{name}.rope.dimension_count"] = int(head * part)
    _refuse_unsaid(kind, {**known, "head_dim": head})
    return values


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary settings, of two those of layers that see everything."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("full_attention") or rope


def _theta(config: Mapping[str, Any], usual: float) -> float:
    rope = _rope(config)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UnsupportedError(
            f"GGUF is not written for rotary angles scaled as {scaling!r}"
        )
    return rope.get("rope_theta", usual)


def _refuse_unsaid(kind: Architecture, config: Mapping[str, Any]) -> None:
    """Raise where llama.cpp would take something else for what no file says."""
    if kind.widest is None:
        return
    off = [key for key in kind.extra if key in config and config[key] is None]
    if off:
        raise UnsupportedError(
            f"GGUF cannot say that {off[0]} is null: where a file has no number "
            "llama.cpp takes Gemma's own"
        )
    lost = [key for key in CAPS if config.get(key) and key not in kind.extra]
    if lost:
        raise UnsupportedError(
            f"GGUF has no {lost[0]} for a {kind.model_type} model, and its config sets "
            f"{config[lost[0]]}"
        )
    wanted = query_scalar(kind, config)
    if config.get("query_pre_attn_scalar", wanted) != wanted:
        raise UnsupportedError(
            f"GGUF cannot say query_pre_attn_scalar: llama.cpp takes {wanted} for such "
            f"a model, and it is {config['query_pre_attn_scalar']}"
        )
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = config.get("rope_local_base_freq", local.get("rope_theta", 10_000.0))
    pattern = config.get("sliding_window_pattern") or config.get(
        "_sliding_window_pattern", USUAL_PATTERN
    )
    if theta != 10_000.0 or pattern != USUAL_PATTERN or _odd_layers(kind, config):
        raise UnsupportedError(
            "GGUF cannot say which layers slide, nor how their rotary angles turn: "
            "llama.cpp takes what Gemma has, and it is something else"
        )


def _odd_layers(kind: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the layers that slide are others than Gemma's."""
    every = USUAL_PATTERN if kind.model_type == "gemma3_text" else 2
    found = config.get("layer_types")
    words = ("full_attention", "sliding_attention")
    return found is not None and list(found) != [
        words[bool((i + 1) % every)] for i in range(len(found))
    ]
