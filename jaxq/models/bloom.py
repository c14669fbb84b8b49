"""BLOOM: no positions but a preference for near keys (alibi), and normed embeddings."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from jaxq.kvcache import Cache
from jaxq.models.attention import alibi
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
from jaxq.models.norms import LayerNorm
from jaxq.models.shape import Shape

ANY_CONTEXT = (
    2048  # alibi has no limit; the models were trained on texts of this length
)


@dataclass(frozen=True, kw_only=True)
class BloomConfig(Shape):
    """The shape of a BLOOM.

    Attributes:
        add_to_normed: attention and feed-forward are added to what they read, the
            normed stream, in place of the stream.
    """

    add_to_normed: bool = False


class BloomAttention(Block):
    """Causal attention; each head has its query, key and value side by side."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config
        fused = self.dense(3 * cfg.hidden_size, "query_key_value", bias=True)(x)
        fused = fused.reshape(*x.shape[:2], cfg.num_heads, 3, cfg.head_dim)
        q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        near = alibi(cfg.num_heads, places.keys)
        mixed, stored = attend_and_keep((q, k, v), places, held, bias=near)
        mixed = mixed.reshape(x.shape)
        return self.dense(cfg.hidden_size, "dense", bias=True)(mixed), stored


class BloomLayer(Block):
    """Attention and feed-forward, each normed before and added to the stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        cfg = self.config
        normed = LayerNorm(cfg.norm_eps, name="input_layernorm")(x)
        mixed, stored = self.part(BloomAttention, "self_attention")(
            normed, places, held
        )
        x = (normed if cfg.add_to_normed else x) + mixed
        normed = LayerNorm(cfg.norm_eps, name="post_attention_layernorm")(x)
        base = normed if cfg.add_to_normed else x
        return base + self.part(FeedForward, "mlp")(normed), stored


class Bloom(Block):
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
        x = LayerNorm(cfg.norm_eps, name="word_embeddings_layernorm")(embed(tokens))
        layers = [self.part(BloomLayer, f"h_{i}", i) for i in range(cfg.num_layers)]
        x, cache = run_layers(layers, x, places, cache)
        x = LayerNorm(cfg.norm_eps, name="ln_f")(x)
        return answer(self.logits(x, embed), cache)


def read_bloom(keys: Keys) -> BloomConfig:
    """Read the config of a BLOOM.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    hidden = keys.size("hidden_size", keys.get("n_embed"))
    layers = keys.count("n_layer", keys.get("num_hidden_layers"))
    heads = keys.size("n_head", keys.get("num_attention_heads"))
    if hidden % heads:
        raise ConfigError(
            f"config.json: n_head {heads} must divide hidden_size {hidden}"
        )
    return BloomConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context=ANY_CONTEXT,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5) or 0.0,
        tied=keys.flag("tie_word_embeddings", True),
        activation="gelu_new",
        add_to_normed=keys.flag("apply_residual_connection_post_layernorm"),
    )
