"""The Llama architecture, and what its relatives turn on by a switch.

Layers are unrolled, not scanned, so that every layer can have a format of its own.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

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
from jaxq.models.hf_rope import read_rope
from jaxq.models.norms import RMSNorm
from jaxq.models.rope import Rope, rotate
from jaxq.models.shape import Shape


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Shape):
    """The shape of a Llama-like model; what a family's switches turn on.

    Attributes:
        qkv_bias: biases on the query, key and value projections.
        output_bias: a bias on attention's output projection.
        mlp_bias: biases in the feed-forward layer.
        qk_norm: an RMS norm over every query and key head (Qwen3, Gemma 3).
        norm_offset: what is added to the weights of all norms (Gemma).
        query_scale: of the scores; None is `1 / sqrt(head_dim)`.
        score_cap: bounds the scores (Gemma 2).
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    query_scale: float | None = None
    score_cap: float | None = None

    def rope_of(self, layer: int) -> Rope:
        """Return the rotary angles of `layer`."""
        del layer
        return self.rope


class Attention(Block):
    """Causal attention with shared key/value heads (GQA) and rotary positions."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config
        q, k, v = self.project(x)
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="k_norm")(k)
        rope = cfg.rope_of(self.layer)
        q, k = rotate(q, places.queries, rope), rotate(k, places.queries, rope)
        mixed, stored = attend_and_keep(
            (q, k, v),
            places,
            held,
            window=cfg.window(self.layer),
            scale=cfg.query_scale,
            cap=cfg.score_cap,
        )
        output = self.dense(cfg.hidden_size, "o_proj", cfg.output_bias)
        return output(mixed.reshape(*x.shape[:2], -1)), stored

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values, `[B, T, heads, head_dim]`."""
        cfg = self.config

        def heads(name: str, count: int) -> jax.Array:
            flat = self.dense(count * cfg.head_dim, name, cfg.qkv_bias)(x)
            return flat.reshape(*x.shape[:2], count, cfg.head_dim)

        return (
            heads("q_proj", cfg.num_heads),
            heads("k_proj", cfg.num_kv_heads),
            heads("v_proj", cfg.num_kv_heads),
        )


class MLP(Block):
    """`down(act(gate(x)) * up(x))`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        gate, up = self.project(x)
        inner = ACTIVATIONS[self.config.activation](gate) * up
        bias = self.config.mlp_bias
        return self.dense(self.config.hidden_size, "down_proj", bias)(inner)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the gate and what it is multiplied with, `[B, T, inner]`."""
        inner, bias = self.inner(), self.config.mlp_bias
        gate = self.dense(inner, "gate_proj", bias)(x)
        return gate, self.dense(inner, "up_proj", bias)(x)

    def inner(self) -> int:
        """Return the width between the projections."""
        return self.config.intermediate_size


class DecoderLayer(Block):
    """Attention and feed-forward, each normed before and added to the stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        normed = self.norm("input_layernorm")(x)
        mixed, stored = self.attention()(normed, places, held)
        x = x + mixed
        normed = self.norm("post_attention_layernorm")(x)
        return x + self.feed_forward(normed, places), stored

    def norm(self, name: str) -> RMSNorm:
        """Return a norm."""
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)

    def attention(self) -> Attention:
        """Return the attention."""
        return self.part(Attention, "self_attn")

    def feed_forward(self, x: jax.Array, places: Places) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        del places
        return self.part(MLP, "mlp")(x)


class Llama(Block):
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
            positions: `int[B, T]`, where a negative position marks padding, which
                nothing attends to; None goes on from where the cache ends, or from 0.
            cache: keys and values of earlier tokens, to which these are added.

        Returns:
            `float32[B, T, vocab]`; with a cache, that and the longer cache.
        """
        cfg = self.config
        places, cache = take_places(tokens, positions, cache)
        embed = self.table(cfg.vocab_size, cfg.hidden_size, "embed_tokens")
        layers = [
            self.part(self.layer_kind(), f"layers_{i}", i)
            for i in range(cfg.num_layers)
        ]
        x, cache = run_layers(layers, self.enter(embed(tokens)), places, cache)
        x = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="norm")(x)
        return answer(self.leave(self.logits(x, embed)), cache)

    def layer_kind(self) -> type[DecoderLayer]:
        """Return the class of the layers."""
        return DecoderLayer

    def enter(self, x: jax.Array) -> jax.Array:
        """Return what the first layer takes, of embeddings `[B, T, hidden]`."""
        return x

    def leave(self, logits: jax.Array) -> jax.Array:
        """Return what is done to the logits at last."""
        return logits


def read_llama_shape(keys: Keys, act: str = "hidden_act") -> dict[str, Any]:
    """Read the sizes that all relatives of Llama name alike.

    Raises:
        ConfigError: a size is missing or senseless, or an activation is not known.
    """
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", heads)
    head_dim = keys.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"config.json: num_key_value_heads {kv_heads} must divide "
            f"num_attention_heads {heads}, and head_dim {head_dim} must be even"
        )
    keys.require("rope_interleaved", False)
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.size("intermediate_size"),
        "num_layers": keys.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": keys.size("max_position_embeddings"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tied": keys.flag("tie_word_embeddings"),
        "activation": keys.activation(act, "silu"),
    }


def with_rope(keys: Keys, shape: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes with the rotary settings, which depend on them."""
    rope = read_rope(keys, shape["context"], shape["head_dim"])
    return {**shape, "rope": rope}


def read_llama(keys: Keys) -> LlamaConfig:
    """Read the config of a Llama.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    bias = keys.flag("attention_bias")
    return LlamaConfig(
        **with_rope(keys, read_llama_shape(keys)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
    )
