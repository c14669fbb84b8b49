"""OPT: learned positions from 2 on, norms before or after, embeddings of any width."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.kvcache import Cache
from jaxq.models.activations import ACTIVATIONS
from jaxq.models.block import Block
from jaxq.models.causal import (
    Held,
    Kept,
    Places,
    answer,
    attend_and_keep,
    run_layers,
    take_places,
)
from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.norms import LayerNorm
from jaxq.models.shape import Shape

FIRST_POSITION = 2  # fairseq kept two rows for padding, and so do the checkpoints


@dataclass(frozen=True, kw_only=True)
class OPTConfig(Shape):
    """The shape of an OPT.

    Attributes:
        embed_size: width of the embeddings, projected where it is not `hidden_size`.
        norm_first: norms before attention and feed-forward, or behind what they add.
        last_norm: a norm behind the last layer.
        bias: on all projections of the layers.
    """

    embed_size: int
    norm_first: bool = True
    last_norm: bool = True
    bias: bool = True


class OPTAttention(Block):
    """Causal attention."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config

        def heads(name: str) -> jax.Array:
            flat = self.dense(cfg.hidden_size, name, cfg.bias)(x)
            return flat.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)

        qkv = heads("q_proj"), heads("k_proj"), heads("v_proj")
        mixed, stored = attend_and_keep(qkv, places, held)
        mixed = mixed.reshape(x.shape)
        return self.dense(cfg.hidden_size, "out_proj", cfg.bias)(mixed), stored


class OPTLayer(Block):
    """Attention and feed-forward, normed before or behind, added to the stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        cfg = self.config
        norm = LayerNorm(cfg.norm_eps, name="self_attn_layer_norm")
        attention = self.part(OPTAttention, "self_attn")
        mixed, stored = attention(norm(x) if cfg.norm_first else x, places, held)
        x = x + mixed if cfg.norm_first else norm(x + mixed)
        norm = LayerNorm(cfg.norm_eps, name="final_layer_norm")
        inner = norm(x) if cfg.norm_first else x
        inner = self.dense(cfg.intermediate_size, "fc1", cfg.bias)(inner)
        inner = ACTIVATIONS[cfg.activation](inner)
        x = x + self.dense(cfg.hidden_size, "fc2", cfg.bias)(inner)
        return (x if cfg.norm_first else norm(x)), stored


class OPT(Block):
    """Token ids in, logits out."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Compute the logits of the token after every given token.

        Args:
            tokens: `int[B, T]`.
            positions: `int[B, T]`, where a negative position marks padding.
            cache: keys and values of earlier tokens, to which these are added.

        Returns:
            `float32[B, T, vocab]`; with a cache, that and the longer cache.
        """
        cfg = self.config
        projected = cfg.embed_size != cfg.hidden_size
        places, cache = take_places(tokens, positions, cache)
        embed = self.table(cfg.vocab_size, cfg.embed_size, "embed_tokens")
        rows = cfg.context + FIRST_POSITION
        place = self.table(rows, cfg.hidden_size, "embed_positions")
        x = embed(tokens)
        if projected:
            x = self.dense(cfg.hidden_size, "project_in")(x)
        x = x + place(jnp.maximum(places.queries, 0) + FIRST_POSITION)
        layers = [self.part(OPTLayer, f"layers_{i}", i) for i in range(cfg.num_layers)]
        x, cache = run_layers(layers, x, places, cache)
        if cfg.last_norm:
            x = LayerNorm(cfg.norm_eps, name="final_layer_norm")(x)
        if projected:
            x = self.dense(cfg.embed_size, "project_out")(x)
        return answer(self.logits(x, embed), cache)


def read_opt(keys: Keys) -> OPTConfig:
    """Read the config of an OPT.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} must divide hidden_size {hidden}"
        )
    keys.require("layer_norm_elementwise_affine", True)
    keys.require("word_embed_proj_bias", False)
    first = keys.flag("do_layer_norm_before", True)
    removed = keys.flag("_remove_final_layer_norm")
    return OPTConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("ffn_dim"),
        num_layers=keys.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context=keys.size("max_position_embeddings"),
        norm_eps=1e-5,
        tied=keys.flag("tie_word_embeddings", True),
        activation=keys.activation("activation_function", "relu"),
        embed_size=keys.size("word_embed_proj_dim", hidden),
        norm_first=first,
        last_norm=first and not removed,
        bias=keys.flag("enable_bias", True),
    )
