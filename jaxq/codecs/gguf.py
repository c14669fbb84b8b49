"""GGUF files of Llama's relatives: names, permuted rows and config.

llama.cpp interleaves the two rotary halves of the query and key rows of architecture
``llama``; here they are put back. The tokenizer is left to the Hugging Face folder.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.gguf_blocks import FLOAT_TYPES, TYPES
from jaxq.codecs.gguf_file import GGUFFile, Tensor, read_file
from jaxq.codecs.source import fill
from jaxq.codecs.unpacked import Unpacked

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
TOP |= {"output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# general.architecture -> Hugging Face's class
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
INTERLEAVED = ("llama",)
# Hugging Face's key -> GGUF's, and what kind of number
KEYS = {
    "num_hidden_layers": ("block_count", int),
    "max_position_embeddings": ("context_length", int),
    "hidden_size": ("embedding_length", int),
    "intermediate_size": ("feed_forward_length", int),
    "num_attention_heads": ("attention.head_count", int),
    "num_key_value_heads": ("attention.head_count_kv", int),
    "head_dim": ("attention.key_length", int),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", float),
    "rope_theta": ("rope.freq_base", float),
}
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """The tensors of a GGUF file, by Hugging Face's names.

    Attributes:
        file: the open file.
        names: of each tensor in the file, by Hugging Face's.
        heads: query heads and key heads whose rows are interleaved, or None.
    """

    file: GGUFFile
    names: Mapping[str, str]
    heads: tuple[int, int] | None

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


def open_gguf(path: Path) -> tuple[GGUFSource, dict[str, Any]]:
    """Return the tensors of a file, and its config as Hugging Face would write it.

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
    config = _config(file, name)
    names = {_hf_name(tensor, path): tensor for tensor in file.tensors}
    heads = None
    if name in INTERLEAVED:
        count = config["num_attention_heads"]
        heads = count, config.get("num_key_value_heads", count)
    return GGUFSource(file, names, heads), config


def _config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[architecture]]}
    config["model_type"] = architecture
    for key, (name, kind) in KEYS.items():
        value = file.values.get(f"{architecture}.{name}")
        if value is None and key in OPTIONAL:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (kind is int and type(value) is not int) or value <= 0:
            raise CheckpointError(
                f"{file.path}: {architecture}.{name} is {str(value)[:80]!a}; it must "
                "be a positive number"
            )
        config[key] = value
    scaling = file.values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise UnsupportedError(
            f"{file.path} scales its rotary angles ({str(scaling)[:40]!a}); put the "
            "model's config.json beside it, which says how"
        )
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix 'token_embd.weight'")
    config["vocab_size"] = table.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if architecture == "llama" and "blk.0.attn_q.bias" in file.tensors:
        config["attention_bias"] = True
    eos = file.values.get("tokenizer.ggml.eos_token_id")
    return config if eos is None else config | {"eos_token_id": eos}


def _hf_name(name: str, path: Path) -> str:
    stem, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem)
    if stem in TOP and leaf == "weight":
        return f"{TOP[stem]}.{leaf}"
    if layer and layer[2] in LAYER and leaf in ("weight", "bias"):
        return f"model.layers.{int(layer[1])}.{LAYER[layer[2]]}.{leaf}"
    raise UnsupportedError(
        f"{path} holds the tensor {name[:80]!a}, which none of "
        f"{', '.join(ARCHITECTURES)} has"
    )
