"""GPT-2: learned positions, norms with means, one projection for q, k and v."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
from jaxq.models.norms import LayerNorm
from jaxq.models.shape import Shape


class GPT2Attention(Block):
    """Causal attention, with a bias on every projection."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config
        fused = self.dense(3 * cfg.hidden_size, "c_attn", bias=True)(x)
        fused = fused.reshape(*x.shape[:2], 3, cfg.num_heads, cfg.head_dim)
        q, k, v = fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
        mixed, stored = attend_and_keep((q, k, v), places, held)
        return self.dense(cfg.hidden_size, "c_proj", bias=True)(
            mixed.reshape(x.shape)
        ), stored


class GPT2MLP(FeedForward):
    """`c_proj(act(c_fc(x)))`."""

    up, down = "c_fc", "c_proj"


class GPT2Layer(Block):
    """Attention and feed-forward, each normed before and added to the stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, held: Held
    ) -> tuple[jax.Array, Kept]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        eps = self.config.norm_eps
        normed = LayerNorm(eps, name="ln_1")(x)
        mixed, stored = self.part(GPT2Attention, "attn")(normed, places, held)
        x = x + mixed
        normed = LayerNorm(eps, name="ln_2")(x)
        return x + self.part(GPT2MLP, "mlp")(normed), stored


class GPT2(Block):
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
        embed = self.table(cfg.vocab_size, cfg.hidden_size, "wte")
        place = self.table(cfg.context, cfg.hidden_size, "wpe")
        x = embed(tokens) + place(jnp.maximum(places.queries, 0))
        layers = [self.part(GPT2Layer, f"h_{i}", i) for i in range(cfg.num_layers)]
        x, cache = run_layers(layers, x, places, cache)
        x = LayerNorm(cfg.norm_eps, name="ln_f")(x)
        return answer(self.logits(x, embed), cache)


def read_gpt2(keys: Keys) -> Shape:
    """Read the config of a GPT-2.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    hidden, heads = keys.size("n_embd"), keys.size("n_head")
    if hidden % heads:
        raise ConfigError(f"config.json: n_head {heads} must divide n_embd {hidden}")
    keys.require("scale_attn_weights", True)
    keys.require("scale_attn_by_inverse_layer_idx", False)
    keys.require("add_cross_attention", False)
    keys.get("reorder_and_upcast_attn")  # the softmax is float32 here anyway
    return Shape(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("n_inner", 4 * hidden),
        num_layers=keys.count("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context=keys.size("n_positions"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5) or 0.0,
        tied=keys.flag("tie_word_embeddings", True),
        activation=keys.activation("activation_function", "gelu_new"),
    )
