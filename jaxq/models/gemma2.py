"""Gemma 2: norms around both halves of a layer, caps, every other layer local."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.models.causal import Held, Kept, Places
from jaxq.models.hf_config import Keys
from jaxq.models.layer_types import read_windows
from jaxq.models.llama import (
    DecoderLayer,
    Llama,
    LlamaConfig,
    read_llama_shape,
    with_rope,
)


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    """The shape of a Gemma.

    Attributes:
        logit_cap: bounds the logits; None does not.
    """

    logit_cap: float | None = None


class GemmaLayer(DecoderLayer):
    """Attention and feed-forward, each normed before and after."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        normed = self.norm("input_layernorm")(x)
        mixed, stored = self.attention()(normed, places, held)
        x = x + self.norm("post_attention_layernorm")(mixed)
        normed = self.norm("pre_feedforward_layernorm")(x)
        fed = self.feed_forward(normed, places)
        return x + self.norm("post_feedforward_layernorm")(fed), stored


class Gemma(Llama):
    """Token ids in, logits out."""

    def layer_kind(self) -> type[DecoderLayer]:
        """Return the class of the layers."""
        return GemmaLayer

    def enter(self, x: jax.Array) -> jax.Array:
        """Return embeddings times the root of their width, rounded like a weight."""
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def leave(self, logits: jax.Array) -> jax.Array:
        """Return logits between `-cap` and `cap`."""
        cap = self.config.logit_cap
        if cap is None:
            return logits
        return jnp.tanh(logits / jnp.float32(cap)) * jnp.float32(cap)


def read_gemma_shape(keys: Keys, every: int) -> dict[str, Any]:
    """Read what Gemma 2 and 3 have in common, all but the rotary settings.

    Args:
        keys: the config.
        every: which layer of so many sees everything; the others slide.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    # an old config has both, and means the second
    keys.get("hidden_act")
    shape = read_llama_shape(keys, "hidden_activation")
    keys.require("use_bidirectional_attention", False)
    layers, bias = shape["num_layers"], keys.flag("attention_bias")
    local = [bool((i + 1) % every) for i in range(layers)]
    window = keys.given("sliding_window")
    return {
        **shape,
        "windows": read_windows(keys, layers, window, local),
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_offset": 1.0,
        "query_scale": keys.size("query_pre_attn_scalar") ** -0.5,
        # here a missing key means the usual cap and a null means none
        "score_cap": keys.given("attn_logit_softcapping"),
        "logit_cap": keys.given("final_logit_softcapping"),
    }


def read_gemma2(keys: Keys) -> GemmaConfig:
    """Read the config of a Gemma 2.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    return GemmaConfig(**with_rope(keys, read_gemma_shape(keys, 2)))
