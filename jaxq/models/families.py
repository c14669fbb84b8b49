"""The model architectures that load: for each, its config, its names and its module.

A new relative of Llama is one reader of its config and one row in `FAMILIES`; a new
architecture also brings a Flax module whose tree mirrors the checkpoint's names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.models.hf_config import SIZES, ConfigError, Keys, read_rope
from jaxq.models.llama import Llama, LlamaConfig
from jaxq.names import lookup


class Slot(NamedTuple):
    """Where a checkpoint's tensor goes.

    Attributes:
        path: in the variables, `("params", "layers_0", "mlp", "up_proj", "kernel")`.
        shape: in the checkpoint, where a matmul's weight is `[out, in]`.
        transposed: the variable is the tensor transposed.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: Hugging Face's `model_type`.
        architecture: Hugging Face's class, as `architectures` lists it.
        read_switches: reads what distinguishes it; returns arguments of `LlamaConfig`.
        defaults: what Hugging Face takes where a key of the config is missing.
        module: the Flax module class, called as `module(config, dtype)`.
    """

    name: str
    architecture: str
    read_switches: Callable[[Keys, int], dict[str, Any]]
    defaults: Mapping[str, Any]
    module: Callable[..., nn.Module] = Llama

    def read_config(self, config: Mapping[str, Any]) -> LlamaConfig:
        """Translate a parsed `config.json`.

        Raises:
            ConfigError: a size is missing or senseless, or a key asks for what
                is not implemented or not known.
        """
        keys = Keys(config, self.name, self.defaults)
        vocab, hidden, intermediate, layers, heads = (keys.size(k) for k in SIZES)
        kv_heads = keys.size("num_key_value_heads", heads)
        head_dim = keys.size("head_dim", max(hidden // heads, 1))
        if heads % kv_heads or head_dim % 2:
            raise ConfigError(
                f"config.json: num_key_value_heads {kv_heads} must divide "
                f"num_attention_heads {heads}, and head_dim {head_dim} must be even"
            )
        context = keys.size("max_position_embeddings")
        keys.require("hidden_act", "silu")
        keys.require("rope_interleaved", False)
        read = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            context=context,
            norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
            rope=read_rope(keys, context),
            tied=bool(keys.get("tie_word_embeddings", False)),
            **self.read_switches(keys, layers),
        )
        keys.refuse_unread()
        return read

    def abstract(self, config: LlamaConfig, dtype: Any = jnp.float32) -> Any:
        """Return the variables as `ShapeDtypeStruct`s, without making any."""
        module = self.module(config)
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(module.init, key, tokens)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables)

    def slots(self, config: LlamaConfig) -> dict[str, Slot]:
        """Return the checkpoint's tensors by name, and where each one goes."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.abstract(config))
        slots = {}
        for keys, leaf in leaves:
            path = tuple(key.key for key in keys)
            transposed = path[-1] == "kernel"
            shape = leaf.shape[::-1] if transposed else leaf.shape
            slots[checkpoint_name(path)] = Slot(path, shape, transposed)
        return slots


def checkpoint_name(path: tuple[str, ...]) -> str:
    """Return what Hugging Face calls the variable at `path`.

    >>> checkpoint_name(("params", "layers_3", "self_attn", "q_proj", "kernel"))
    'model.layers.3.self_attn.q_proj.weight'
    """
    _, *modules, leaf = path
    stem = ".".join(modules).replace("layers_", "layers.")
    prefix = "" if modules[0] == "lm_head" else "model."
    return f"{prefix}{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed `config.json`, by `architectures` or `model_type`.

    Raises:
        UnknownNameError: the architecture is not known; says which are.
        ConfigError: the config names no architecture.
    """
    named = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in named:
            return family
    if named:
        table = {family.architecture: family for family in FAMILIES.values()}
        return lookup(table, str(named[0]), "model architecture")
    if "model_type" not in config:
        raise ConfigError(
            "config.json has neither 'architectures' nor 'model_type', so nothing says "
            f"which model this is; known are {', '.join(FAMILIES)}"
        )
    return lookup(FAMILIES, str(config["model_type"]), "model family")


def _llama(keys: Keys, layers: int) -> dict[str, Any]:
    del layers
    bias = bool(keys.get("attention_bias", False))
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(keys.get("mlp_bias", False)),
    }


def _mistral(keys: Keys, layers: int) -> dict[str, Any]:
    # Here a missing key means 4096 and a null means no window.
    window = keys.given("sliding_window")
    return {"windows": () if window is None else (window,) * layers}


def _qwen2(keys: Keys, layers: int) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(keys, layers)}


def _qwen3(keys: Keys, layers: int) -> dict[str, Any]:
    bias = bool(keys.get("attention_bias", False))
    windows = _qwen_windows(keys, layers)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "windows": windows,
    }


def _qwen_windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Read which layers see a window: a list of them, or all from a layer on."""
    keys.require("use_mrope", False)
    window = keys.given("sliding_window")
    if not keys.get("use_sliding_window", False):
        window = None
    first, kinds = keys.get("max_window_layers"), keys.get("layer_types")
    if kinds is None:
        slides = [layer >= first for layer in range(layers)]
    else:
        known = {"full_attention": False, "sliding_attention": True}
        if len(kinds) != layers or not set(kinds) <= set(known):
            raise ConfigError(
                f"config.json: layer_types is {kinds!r}; it must name one of "
                f"{', '.join(known)} for each of the {layers} layers"
            )
        slides = [known[kind] for kind in kinds]
    if window is None or not any(slides):
        return ()
    return tuple(window if slide else None for slide in slides)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", "LlamaForCausalLM", _llama, {"max_position_embeddings": 2048}
    ),
    "mistral": Family(
        "mistral",
        "MistralForCausalLM",
        _mistral,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _qwen2,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _qwen3,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
}
