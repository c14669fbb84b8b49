"""GPT-NeoX and Pythia: attention and feed-forward side by side, heads turn in part."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from jaxq.kvcache import Cache
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
from jaxq.models.hf_rope import Usual, read_rope
from jaxq.models.norms import LayerNorm
from jaxq.models.rope import Rope, rotate
from jaxq.models.shape import Shape


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(Shape):
    """The shape of a GPT-NeoX.

    Attributes:
        parallel: attention and feed-forward read the same stream.
        attention_bias: biases on attention's projections.
    """

    parallel: bool = True
    attention_bias: bool = True


class GPTNeoXAttention(Block):
    """Causal attention; each head has its query, key and value side by side."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config
        width, bias = cfg.hidden_size, cfg.attention_bias
        fused = self.dense(3 * width, "query_key_value", bias)(x)
        fused = fused.reshape(*x.shape[:2], cfg.num_heads, 3, cfg.head_dim)
        q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        q, k = (rotate(heads, places.queries, cfg.rope) for heads in (q, k))
        mixed, stored = attend_and_keep((q, k, v), places, held)
        return self.dense(width, "dense", bias)(mixed.reshape(x.shape)), stored


class GPTNeoXLayer(Block):
    """Attention and feed-forward, side by side or one behind the other."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        cfg = self.config
        normed = LayerNorm(cfg.norm_eps, name="input_layernorm")(x)
        attention = self.part(GPTNeoXAttention, "attention")
        mixed, stored = attention(normed, places, held)
        after = x + mixed
        read = x if cfg.parallel else after
        normed = LayerNorm(cfg.norm_eps, name="post_attention_layernorm")(read)
        return after + self.part(FeedForward, "mlp")(normed), stored


class GPTNeoX(Block):
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
        embed = self.table(cfg.vocab_size, cfg.hidden_size, "embed_in")
        layers = [
            self.part(GPTNeoXLayer, f"layers_{i}", i) for i in range(cfg.num_layers)
        ]
        x, cache = run_layers(layers, embed(tokens), places, cache)
        x = LayerNorm(cfg.norm_eps, name="final_layer_norm")(x)
        return answer(self.logits(x, embed, "embed_out"), cache)


def read_gpt_neox(keys: Keys) -> GPTNeoXConfig:
    """Read the config of a GPT-NeoX.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} must divide hidden_size {hidden}"
        )
    keys.require("is_decoder", False, True)
    context, head_dim = keys.size("max_position_embeddings"), hidden // heads
    return GPTNeoXConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("intermediate_size"),
        num_layers=keys.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        context=context,
        norm_eps=keys.number("layer_norm_eps", 1e-5) or 0.0,
        rope=_read_rope(keys, context, head_dim),
        tied=keys.flag("tie_word_embeddings"),
        activation=keys.activation("hidden_act", "gelu"),
        parallel=keys.flag("use_parallel_residual", True),
        attention_bias=keys.flag("attention_bias", True),
    )


def _read_rope(keys: Keys, context: int, head_dim: int) -> Rope:
    """Read the rotary settings, which had names of their own before transformers 5."""
    theta = keys.number("rotary_emb_base", 10_000.0) or 10_000.0
    share = keys.number("rotary_pct", 0.25) or 0.25
    return read_rope(keys, context, head_dim, Usual(theta, share, whole=False))
