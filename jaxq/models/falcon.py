"""Falcon: attention beside the feed-forward layer, few keys, rotary or alibi."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.kvcache import Cache
from jaxq.models.attention import alibi_slopes
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
from jaxq.models.feed_forward import FeedForward
from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.hf_rope import read_rope
from jaxq.models.norms import LayerNorm
from jaxq.models.rope import rotate
from jaxq.models.shape import Shape


@dataclass(frozen=True, kw_only=True)
class FalconConfig(Shape):
    """The shape of a Falcon.

    Attributes:
        grouped: each key head lies behind the query heads that share it (Falcon 40b);
            otherwise all keys lie behind all queries, or each head's three together.
        parallel: attention and feed-forward are added to the same stream.
        norms: before the two halves of a layer; 1 or 2.
        bias: on all projections.
        alibi: near keys are preferred, in place of rotary positions.
    """

    grouped: bool = False
    parallel: bool = True
    norms: int = 1
    bias: bool = False
    alibi: bool = False


class FalconAttention(Block):
    """Causal attention with few keys."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config
        q, k, v = self._project(x)
        near = None
        if cfg.alibi:
            near = falcon_alibi(cfg.num_heads, cfg.head_dim, places.keys)
        else:
            q, k = (rotate(heads, places.queries, cfg.rope) for heads in (q, k))
        mixed, stored = attend_and_keep((q, k, v), places, held, bias=near)
        mixed = mixed.reshape(x.shape)
        return self.dense(cfg.hidden_size, "dense", cfg.bias)(mixed), stored

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values, `[B, T, heads, head_dim]`.

        The fused projection holds, for every key head, the queries that share it, the
        key and the value.
        """
        cfg = self.config
        shared = cfg.num_heads // cfg.num_kv_heads
        features = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
        fused = self.dense(features, "query_key_value", cfg.bias)(x)
        lead = x.shape[:2]
        fused = fused.reshape(*lead, cfg.num_kv_heads, shared + 2, cfg.head_dim)
        q = fused[..., :-2, :].reshape(*lead, cfg.num_heads, cfg.head_dim)
        return q, fused[..., -2, :], fused[..., -1, :]


class FalconMLP(FeedForward):
    """The feed-forward layer, its biases as the config says."""

    @property
    def bias(self) -> bool:
        """Whether the projections have one."""
        return bool(self.config.bias)


class FalconLayer(Block):
    """Attention and feed-forward, side by side or one behind the other."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        cfg = self.config
        attention = self.part(FalconAttention, "self_attention")
        mlp = self.part(FalconMLP, "mlp")
        two = cfg.parallel and cfg.norms == 2
        normed = self._norm("ln_attn" if two else "input_layernorm")(x)
        mixed, stored = attention(normed, places, held)
        if two:
            return x + mixed + mlp(self._norm("ln_mlp")(x)), stored
        if cfg.parallel:
            return x + mixed + mlp(normed), stored
        x = x + mixed
        return x + mlp(self._norm("post_attention_layernorm")(x)), stored

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.norm_eps, name=name)


class Falcon(Block):
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
        places, cache = take_places(tokens, positions, cache)
        embed = self.table(cfg.vocab_size, cfg.hidden_size, "word_embeddings")
        layers = [self.part(FalconLayer, f"h_{i}", i) for i in range(cfg.num_layers)]
        x, cache = run_layers(layers, embed(tokens), places, cache)
        x = LayerNorm(cfg.norm_eps, name="ln_f")(x)
        return answer(self.logits(x, embed), cache)


def falcon_alibi(heads: int, head_dim: int, key_positions: jax.Array) -> jax.Array:
    """Return alibi as Falcon has it, `float32[B, heads, 1, S]`.

    It is divided by the root of the head's width, as the scores are, and rounded to
    bfloat16 on the way, which the models were trained with.
    """
    slopes = jnp.asarray(alibi_slopes(heads), jnp.bfloat16)[None, :, None]
    rounded = slopes * key_positions.astype(jnp.bfloat16)[:, None, :]
    return rounded.astype(jnp.float32)[:, :, None] * jnp.float32(head_dim**-0.5)


def read_falcon(keys: Keys) -> FalconConfig:
    """Read the config of a Falcon.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    hidden = keys.size("hidden_size", keys.get("n_embed"))
    heads = keys.size("num_attention_heads", keys.get("n_head"))
    layers = keys.count("num_hidden_layers", keys.get("n_layer"))
    grouped, alone = (
        keys.flag("new_decoder_architecture"),
        keys.flag("multi_query", True),
    )
    several = keys.size("num_kv_heads", keys.get("n_head_kv") or heads)
    kv_heads = several if grouped else 1 if alone else heads
    if hidden % heads or heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} must divide hidden_size "
            f"{hidden}, and num_kv_heads {kv_heads} must divide num_attention_heads"
        )
    context, head_dim = keys.size("max_position_embeddings"), hidden // heads
    parallel = keys.flag("parallel_attn", True)
    keys.require("rotary", True, False)  # says what `alibi` says
    norms = keys.size("num_ln_in_parallel_attn", 2 if grouped else 1)
    if (
        (grouped and not parallel)
        or norms not in (1, 2)
        or (norms == 2 and not grouped)
    ):
        raise ConfigError(
            f"config.json: new_decoder_architecture {grouped} with parallel_attn "
            f"{parallel} and num_ln_in_parallel_attn {norms} is not implemented"
        )
    return FalconConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("ffn_hidden_size", 4 * hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5) or 0.0,
        rope=read_rope(keys, context, head_dim),
        tied=keys.flag("tie_word_embeddings", True),
        activation=keys.activation("activation", "gelu"),
        grouped=grouped,
        parallel=parallel,
        norms=norms,
        bias=keys.flag("bias"),
        alibi=keys.flag("alibi"),
    )
