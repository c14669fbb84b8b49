"""Read a Hugging Face `config.json` strictly: a key that is not understood is refused.

A key nobody reads may still change the computation, and a model that computes something
else is worse than one that does not load. So every key is read, or listed as harmless,
or listed with the only values implemented; everything else stops with its name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxq.models.rope import BENDS, Rope

# Keys that say how to train, store, serve or name a model, not what it computes.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "do_sample",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_new_tokens",
        "model_type",
        "name_or_path",
        "num_beams",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


class ConfigError(ValueError):
    """A `config.json` that is incomplete or asks for what is not implemented."""


@dataclass
class Keys:
    """A config of which every key must be asked for.

    Attributes:
        config: the parsed `config.json`.
        family: whose config it is; for messages.
        defaults: what Hugging Face takes where a key is missing.
    """

    config: Mapping[str, Any]
    family: str
    defaults: Mapping[str, Any]
    seen: set[str] = field(default_factory=set)

    def get(self, key: str, otherwise: Any = None) -> Any:
        """Return the value of `key`, or its default where it is missing or null."""
        self.seen.add(key)
        value = self.config.get(key)
        return self.defaults.get(key, otherwise) if value is None else value

    def given(self, key: str) -> Any:
        """Return the value of `key` as written: null stays None; else the default."""
        self.seen.add(key)
        return self.config.get(key, self.defaults.get(key))

    def size(self, key: str, otherwise: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            ConfigError: it is missing, or no positive integer.
        """
        value = self.get(key, otherwise)
        if value is None:
            raise ConfigError(
                f"config.json has no {key!r}, which every {self.family} model needs; "
                "add it, or fetch the file again"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"config.json: {key!r} is {value!r}; it must be a positive integer"
            )
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse values of `key` other than those implemented; missing is fine.

        Raises:
            ConfigError: the value is another.
        """
        value = self.given(key)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"config.json: {key!r} is {value!r}, which changes the computation; "
                f"{self.family} is implemented with "
                f"{' or '.join(map(repr, allowed))} only"
            )

    def refuse_unread(self) -> None:
        """Refuse keys that nobody read.

        Raises:
            ConfigError: there are some whose value is not null.
        """
        unread = sorted(
            key
            for key, value in self.config.items()
            if value is not None and key not in self.seen and key not in HARMLESS
        )
        if unread:
            listed = ", ".join(f"{key} = {self.config[key]!r}" for key in unread)
            raise ConfigError(
                f"config.json has keys that {self.family} does not know and that may "
                f"change the computation: {listed}. If they do not, remove them (or "
                "set them to null); if they do, this model needs a family of its own"
            )


def read_rope(keys: Keys, context: int) -> Rope:
    """Read the rotary settings in the spelling of transformers 4 or 5.

    transformers 4 wrote `rope_theta` and `rope_scaling: {"type" | "rope_type": ...}`;
    5 writes one `rope_parameters: {"rope_type": ..., "rope_theta": ...}`.

    Raises:
        ConfigError: a scaling that is not implemented, or one with unknown settings.
    """
    theta = keys.get("rope_theta", 10_000.0)
    written = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    keys.get("rope_scaling")
    keys.require("partial_rotary_factor", 1.0)
    settings = {key: value for key, value in written.items() if value is not None}
    kind = settings.pop("type", "default")
    kind = settings.pop("rope_type", kind)
    if kind not in BENDS or any(isinstance(value, dict) for value in settings.values()):
        raise ConfigError(
            f"config.json: rope scaling {kind!r} of {written!r} is not implemented; "
            f"implemented are {', '.join(BENDS)}, one for all layers"
        )
    theta = settings.pop("rope_theta", theta)
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            "config.json: partial_rotary_factor other than 1 is not implemented"
        )
    if unknown := sorted(set(settings) - ROPE_KEYS[kind]):
        raise ConfigError(
            f"config.json: rope scaling {kind!r} has the unknown settings "
            f"{', '.join(unknown)}; known are {', '.join(sorted(ROPE_KEYS[kind]))}"
        )
    if kind == "default":
        return Rope(theta=float(theta))
    if kind == "linear":
        return Rope(float(theta), kind, _factor(settings, kind))
    outer = keys.get("original_max_position_embeddings")
    inner = settings.get("original_max_position_embeddings", context)
    original = inner if outer is None else outer
    if kind == "llama3":
        return _llama3(float(theta), settings, original)
    return _yarn(float(theta), settings, original, context)


def _factor(settings: Mapping[str, Any], kind: str) -> float:
    factor = settings.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise ConfigError(
            f"config.json: rope scaling {kind!r} has factor {factor!r}; it must be a "
            "number of at least 1"
        )
    return float(factor)


def _llama3(theta: float, settings: Mapping[str, Any], original: int) -> Rope:
    low, high = settings.get("low_freq_factor"), settings.get("high_freq_factor")
    if low is None or high is None or not low < high:
        raise ConfigError(
            f"config.json: rope scaling 'llama3' has low_freq_factor {low!r} and "
            f"high_freq_factor {high!r}; it needs both, the first below the second"
        )
    return Rope(
        theta,
        "llama3",
        _factor(settings, "llama3"),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_context=original,
    )


def _yarn(
    theta: float, settings: Mapping[str, Any], original: int, context: int
) -> Rope:
    if settings.get("factor") is None:
        factor = context / original
    else:
        factor = _factor(settings, "yarn")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = settings.get("attention_factor")
    if amplitude is None:
        one, every = settings.get("mscale"), settings.get("mscale_all_dim")
        both = one and every
        amplitude = magnitude(one) / magnitude(every) if both else magnitude(1.0)
    return Rope(
        theta,
        "yarn",
        factor,
        original_context=original,
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        truncate=bool(settings.get("truncate", True)),
        amplitude=float(amplitude),
    )
