"""The settings of a GGUF file: read as Hugging Face's config, written of a model."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.gguf_architectures import CAPS, ROTARY, Architecture
from jaxq.codecs.gguf_file import GGUFFile
from jaxq.codecs.gguf_gemma import query_scalar

MOST_EXPERTS = 10_000
SOFTMAX = 1  # how a router makes weights of its scores
MEAN = 1  # how an encoder makes one vector of many


def _window(shape: Any) -> int | None:
    return next((window for window in shape.windows if window is not None), None)


# GGUF's key -> what kind of value it has, and where a model's config has it
SETTINGS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "block_count": (int, attrgetter("num_layers")),
    "decoder_block_count": (int, attrgetter("decoder_layers")),
    "context_length": (int, attrgetter("context")),
    "embedding_length": (int, attrgetter("hidden_size")),
    "feed_forward_length": (int, attrgetter("intermediate_size")),
    "attention.head_count": (int, attrgetter("num_heads")),
    "attention.head_count_kv": (int, attrgetter("num_kv_heads")),
    "attention.key_length": (int, attrgetter("head_dim")),
    "attention.value_length": (int, attrgetter("head_dim")),
    "attention.layer_norm_epsilon": (float, attrgetter("norm_eps")),
    "attention.layer_norm_rms_epsilon": (float, attrgetter("norm_eps")),
    "attention.sliding_window": (int, _window),
    "attention.relative_buckets_count": (int, attrgetter("buckets")),
    "decoder_start_token_id": (int, attrgetter("start")),
    "expert_count": (int, attrgetter("num_experts")),
    "expert_used_count": (int, attrgetter("per_token")),
    "expert_feed_forward_length": (int, attrgetter("expert_size")),
    "expert_shared_feed_forward_length": (int, attrgetter("shared_size")),
    "attn_logit_softcapping": (float, attrgetter("score_cap")),
    "final_logit_softcapping": (float, attrgetter("logit_cap")),
    "use_parallel_residual": (bool, attrgetter("parallel")),
    "rope.freq_base": (float, attrgetter("rope.theta")),
    "rope.dimension_count": (int, lambda shape: shape.rope.width(shape.head_dim)),
}
# What llama.cpp takes where a file has no such key; of others, some may be missing.
MISSING: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "decoder_block_count": lambda known: known["block_count"],
    "decoder_start_token_id": lambda known: 0,
    "attention.head_count_kv": lambda known: known["attention.head_count"],
    "attention.key_length": lambda known: (
        known["embedding_length"] // known["attention.head_count"]
    ),
    "rope.freq_base": lambda known: 10_000.0,
    "expert_feed_forward_length": lambda known: (
        known["feed_forward_length"] // known["expert_used_count"]
    ),
    "expert_shared_feed_forward_length": lambda known: known["feed_forward_length"],
}
OPTIONAL = ("attention.sliding_window", *CAPS)
# How a checkpoint lays out its rows, which changes nothing that is computed.
LAYOUT = ("grouped",)


def read_numbers(file: GGUFFile, row: Architecture) -> dict[str, Any]:
    """Return the settings of a file by GGUF's keys, all that there are.

    Raises:
        CheckpointError: one is missing, or no positive number.
    """
    found: dict[str, Any] = {}
    for key in row.keys:
        value = file.values.get(f"{row.gguf}.{key}")
        if key in OPTIONAL and value in (None, 0):
            if value is not None:
                found[key] = None  # llama.cpp's word for a window or a cap that is not
            continue
        if value is None and key in MISSING:
            value = MISSING[key](found)
        _check(file, f"{row.gguf}.{key}", value, SETTINGS[key][0])
        found[key] = value
    if found.get("expert_count", 0) > MOST_EXPERTS:
        raise CheckpointError(
            f"{file.path}: {row.gguf}.expert_count is {found['expert_count']}; no "
            f"model has more than {MOST_EXPERTS}"
        )
    return found


def _check(file: GGUFFile, key: str, value: Any, kind: type) -> None:
    if kind is bool:
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{file.path}: {key} is {str(value)[:80]!a}; it must be true or false"
            )
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.endswith("_token_id") and type(value) is int and value == 0:
        return
    if not number or (kind is int and type(value) is not int) or not value > 0:
        raise CheckpointError(
            f"{file.path}: {key} is {str(value)[:80]!a}; it must be a positive number"
        )


def to_config(
    file: GGUFFile, row: Architecture, numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a file's settings as Hugging Face would write them.

    Args:
        file: the file.
        row: of its architecture.
        numbers: what `read_numbers` found.

    Raises:
        CheckpointError: a table of embeddings is missing.
        UnsupportedError: a setting cannot be read from the file.
    """
    scaling = file.values.get(f"{row.gguf}.rope.scaling.type", "none")
    tables = [table for table in ROTARY if f"{table}.weight" in file.tensors]
    if scaling != "none" or tables:
        raise UnsupportedError(
            f"{file.path} scales its rotary angles ({str(scaling)[:40]!a}); put the "
            "model's config.json beside it, which says how"
        )
    _refuse_other_routers(file, row)
    _refuse_other_pools(file, row)
    config: dict[str, Any] = {
        "architectures": [row.name],
        "model_type": row.model_types[0],
        "vocab_size": _rows(file, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{row.keys[key]: value for key, value in numbers.items()},
        **row.fixed,
        **{key: _rows(file, f"{name}.weight") for name, key in row.rows.items()},
    }
    for name, key in row.biases.items():
        config[key] = f"blk.0.{name}.bias" in file.tensors
    if row.turns:
        config |= _rotary_share(file, row, numbers)
    if row.widest is not None:
        wide = numbers["embedding_length"] // numbers["attention.head_count"]
        widths = (numbers["attention.key_length"], wide)
        scalar = query_scalar(row, numbers["block_count"], widths)
        config["query_pre_attn_scalar"] = scalar
    eos = file.values.get("tokenizer.ggml.eos_token_id")
    return config if eos is None else config | {"eos_token_id": eos}


def _rows(file: GGUFFile, name: str) -> int:
    table = file.tensors.get(name)
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix {name!r}")
    return table.shape[0]


def _refuse_other_pools(file: GGUFFile, row: Architecture) -> None:
    value = file.values.get(f"{row.gguf}.pooling_type", MEAN)
    if value not in (0, MEAN):
        raise UnsupportedError(
            f"{file.path}: {row.gguf}.pooling_type is {str(value)[:80]!a}, and a file "
            f"alone is read as one whose vectors are means ({MEAN}); put the model's "
            "config.json and modules.json beside it"
        )


def _refuse_other_routers(file: GGUFFile, row: Architecture) -> None:
    usual = {"expert_gating_func": (0, SOFTMAX), "expert_weights_scale": (0, 1)}
    for key, known in usual.items():
        value = file.values.get(f"{row.gguf}.{key}", known[1])
        if row.experts and value not in known:
            raise UnsupportedError(
                f"{file.path}: {row.gguf}.{key} is {str(value)[:80]!a}; the experts of "
                f"a {row.name} are weighted with the softmax, times {known[1]}"
            )


def _rotary_share(
    file: GGUFFile, row: Architecture, numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Return which part of a head turns, where it need not be all of it."""
    wide = numbers["embedding_length"] // numbers["attention.head_count"]
    head = numbers.get("attention.key_length", wide)
    width = file.values.get(f"{row.gguf}.rope.dimension_count", head)
    if row.part is None and width == head:
        return {}
    if row.part is None or type(width) is not int or not 0 < width <= head:
        raise UnsupportedError(
            f"{file.path}: {row.gguf}.rope.dimension_count is {str(width)[:80]}, and "
            f"heads are {head} wide"
            + ("" if row.part else f"; no {row.gguf} turns a part of a head")
        )
    return {row.part: width / head}


def write_settings(shape: Any, row: Architecture) -> dict[str, Any]:
    """Return the settings of a file, by its keys.

    Args:
        shape: the model's config, as its family reads it.
        row: of its architecture.

    Raises:
        UnsupportedError: its rotary angles are scaled.
    """
    if row.turns and shape.rope.kind != "default":
        raise UnsupportedError(
            f"GGUF is not written for rotary angles scaled as {shape.rope.kind!r}"
        )
    values: dict[str, Any] = {}
    for key in (*row.keys, *row.written):
        kind, of = SETTINGS[key]
        value = of(shape)
        value = row.absent.get(key) if value is None else value
        if value is not None:
            values[f"{row.gguf}.{key}"] = kind(value)
    return values | {f"{row.gguf}.{key}": same for key, same in row.constants.items()}


def refuse_unsaid(row: Architecture, shape: Any, again: Any) -> None:
    """Raise where a file means another model than the one that is written.

    Args:
        row: of its architecture.
        shape: the model's config, as its family reads it.
        again: what the file's settings are read as.

    Raises:
        UnsupportedError: it says what GGUF cannot.
    """
    for field in dataclasses.fields(again):
        ours, theirs = getattr(shape, field.name, None), getattr(again, field.name)
        if field.name not in LAYOUT and not _alike(ours, theirs):
            raise UnsupportedError(
                f"GGUF cannot say that {field.name} is {str(ours)[:80]}: llama.cpp "
                f"computes such a {row.gguf} model with {str(theirs)[:80]}"
            )


def _alike(a: Any, b: Any) -> bool:
    """Whether two settings are equal, as far as float32 tells."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
        return all(_alike(x, y) for x, y in pairs)
    if isinstance(a, tuple) and isinstance(b, tuple):
        some = [x for x in (*a, *b) if x is not None]
        return not some or a == b  # no window anywhere has two spellings
    if isinstance(a, float) or isinstance(b, float):
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        return numbers and math.isclose(a, b, rel_tol=1e-6)
    return a == b
