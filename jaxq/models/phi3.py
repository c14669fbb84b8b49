"""Phi-3: Llama whose parallel projections are one, and whose heads may turn in part."""

import jax
import jax.numpy as jnp

from jaxq.models.causal import Places
from jaxq.models.hf_config import Keys
from jaxq.models.hf_rope import Usual, read_rope
from jaxq.models.llama import (
    MLP,
    Attention,
    DecoderLayer,
    Llama,
    LlamaConfig,
    read_llama_shape,
)

# The first versions of Phi-3 had other names for it.
USUAL = Usual(whole=False, aliases={"su": "longrope", "yarn": "longrope"})


class FusedAttention(Attention):
    """Attention with one projection for queries, keys and values."""

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values, `[B, T, heads, head_dim]`."""
        cfg = self.config
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        fused = self.dense(heads * cfg.head_dim, "qkv_proj")(x)
        fused = fused.reshape(*x.shape[:2], heads, cfg.head_dim)
        ends = (cfg.num_heads, cfg.num_heads + cfg.num_kv_heads)
        q, k, v = jnp.split(fused, ends, axis=2)
        return q, k, v


class FusedMLP(MLP):
    """A gated feed-forward layer with one projection for both factors."""

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the gate and what it is multiplied with, `[B, T, inner]`."""
        both = self.dense(2 * self.config.intermediate_size, "gate_up_proj")(x)
        gate, up = jnp.split(both, 2, axis=-1)
        return gate, up


class FusedLayer(DecoderLayer):
    """A decoder layer with fused projections."""

    def attention(self) -> Attention:
        """Return the attention."""
        return self.part(FusedAttention, "self_attn")

    def feed_forward(self, x: jax.Array, places: Places) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        del places
        return self.part(FusedMLP, "mlp")(x)


class Phi3(Llama):
    """Token ids in, logits out."""

    def layer_kind(self) -> type[DecoderLayer]:
        """Return the class of the layers."""
        return FusedLayer


def read_phi3(keys: Keys) -> LlamaConfig:
    """Read the config of a Phi-3, 3.5 or 4-mini.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    shape = read_llama_shape(keys)
    keys.require("attention_bias", False)
    keys.require("mlp_bias", False)
    rope = read_rope(keys, shape["context"], shape["head_dim"], USUAL)
    window = keys.given("sliding_window")
    windows = () if window is None else (window,) * shape["num_layers"]
    return LlamaConfig(**shape, rope=rope, windows=windows)
