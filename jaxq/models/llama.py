"""The Llama architecture in Flax Linen, and its relatives that differ by a switch.

Nothing here knows of quantization: the layers are `nn.Dense` and `nn.Embed`, and
`jaxq.quantized(model.apply)` finds their weights in the traced function. Layers are
unrolled, not scanned, so that every layer can have a format of its own.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.models.cache import KVCache, LayerCache, append, write
from jaxq.models.rope import Rope, rotate


def wide_dot(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.dot_general` with a float32 result, whatever the operands.

    Saying so matters on a CPU, too: XLA's bfloat16 matmul with a float32 result is six
    times faster than the one with a bfloat16 result.
    """
    del preferred_element_type
    return jax.lax.dot_general(
        x, w, dimension_numbers, precision, preferred_element_type=jnp.float32
    )


def rounded_dot(x: jax.Array, w: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`wide_dot`, rounded once, to the dtype of `x`."""
    return wide_dot(x, w, *args, **options).astype(x.dtype)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama-like model; what a family's switches turn on.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head.
        context: tokens the model was made for.
        norm_eps: added to the mean square in every norm.
        rope: rotary angles.
        tied: the head is the embedding transposed.
        qkv_bias: biases on the query, key and value projections.
        output_bias: a bias on attention's output projection.
        mlp_bias: biases in the feed-forward layer.
        qk_norm: an RMS norm over every query and key head (Qwen3).
        windows: per layer, how many tokens back attention sees; None sees all. An
            empty tuple is None for every layer.
        init_scale: standard deviation of fresh weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int = 2048
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    init_scale: float = 0.02

    def window(self, layer: int) -> int | None:
        """Return how many tokens back the attention of `layer` sees; None is all."""
        return self.windows[layer] if self.windows else None


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalized `x[..., width]`, in its dtype."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(square + jnp.float32(self.eps))
        return (normed * weight.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Causal attention with shared key/value heads (GQA) and rotary positions."""

    config: LlamaConfig
    window: int | None
    dtype: Any
    dot_general: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        key_positions: jax.Array,
        cache: tuple[LayerCache, jax.Array] | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to."""
        cfg = self.config
        q = self._heads(x, "q_proj", cfg.num_heads)
        k = self._heads(x, "k_proj", cfg.num_kv_heads)
        v = self._heads(x, "v_proj", cfg.num_kv_heads)
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, name="k_norm")(k)
        q, k = rotate(q, positions, cfg.rope), rotate(k, positions, cfg.rope)
        stored = None
        if cache is not None:
            stored = write(cache[0], k, v, at=cache[1])
            k, v = stored.keys.astype(k.dtype), stored.values.astype(v.dtype)
        mask = visible(positions, key_positions, self.window)
        mixed = attend(q, k, v, mask).reshape(*x.shape[:2], -1)
        project = nn.Dense(
            cfg.hidden_size,
            use_bias=cfg.output_bias,
            dtype=self.dtype,
            dot_general=self.dot_general,
            kernel_init=nn.initializers.normal(cfg.init_scale),
            name="o_proj",
        )
        return project(mixed), stored

    def _heads(self, x: jax.Array, name: str, heads: int) -> jax.Array:
        flat = nn.Dense(
            heads * self.config.head_dim,
            use_bias=self.config.qkv_bias,
            dtype=self.dtype,
            dot_general=self.dot_general,
            kernel_init=nn.initializers.normal(self.config.init_scale),
            name=name,
        )(x)
        return flat.reshape(*x.shape[:2], heads, self.config.head_dim)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig
    dtype: Any
    dot_general: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        cfg = self.config
        gate = self._dense(cfg.intermediate_size, "gate_proj")(x)
        up = self._dense(cfg.intermediate_size, "up_proj")(x)
        return self._dense(cfg.hidden_size, "down_proj")(nn.silu(gate) * up)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=self.config.mlp_bias,
            dtype=self.dtype,
            dot_general=self.dot_general,
            kernel_init=nn.initializers.normal(self.config.init_scale),
            name=name,
        )


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each normed before and added to the stream."""

    config: LlamaConfig
    window: int | None
    dtype: Any
    dot_general: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        key_positions: jax.Array,
        cache: tuple[LayerCache, jax.Array] | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return the stream `[B, T, hidden]` after this layer, and its cache."""
        eps = self.config.norm_eps
        attention = Attention(
            self.config, self.window, self.dtype, self.dot_general, name="self_attn"
        )
        normed = RMSNorm(eps, name="input_layernorm")(x)
        mixed, stored = attention(normed, positions, key_positions, cache)
        x = x + mixed
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        mlp = MLP(self.config, self.dtype, self.dot_general, name="mlp")
        return x + mlp(normed), stored


class Llama(nn.Module):
    """Token ids in, logits out.

    Attributes:
        config: the shape.
        dtype: what matmuls compute in; None is the dtype of the parameters. Norms,
            rotations and the softmax are float32 in any case.
        dot_general: the projections' matmul, for training with another gradient.
    """

    config: LlamaConfig
    dtype: Any = None
    dot_general: Any = rounded_dot

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
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
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = positions if cache is None else positions + cache.end
            positions = jnp.broadcast_to(positions, tokens.shape)
        embed = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(cfg.init_scale),
            name="embed_tokens",
        )
        x = embed(tokens)
        key_positions = positions
        if cache is not None:
            cache = append(cache, positions)
            key_positions = cache.positions
        layers: list[Any] = []
        for index in range(cfg.num_layers):
            layer = DecoderLayer(
                cfg,
                cfg.window(index),
                self.dtype,
                self.dot_general,
                name=f"layers_{index}",
            )
            held = None if cache is None else (cache.layers[index], cache.start)
            x, stored = layer(x, positions, key_positions, held)
            layers.append(stored)
        logits = self._head(RMSNorm(cfg.norm_eps, name="norm")(x), embed)
        if cache is None:
            return logits
        return logits, replace(cache, layers=tuple(layers))

    def _head(self, x: jax.Array, embed: nn.Embed) -> jax.Array:
        """Return float32 logits: rounded to bfloat16, many would be equal."""
        if self.config.tied:
            table = embed.embedding.astype(x.dtype)
            return wide_dot(x, table, (((2,), (1,)), ((), ())))
        head = nn.Dense(
            self.config.vocab_size,
            use_bias=False,
            dtype=self.dtype,
            dot_general=wide_dot,
            kernel_init=nn.initializers.normal(self.config.init_scale),
            name="lm_head",
        )
        return head(x)


def visible(
    positions: jax.Array, key_positions: jax.Array, window: int | None
) -> jax.Array:
    """Return `bool[B, T, S]`: which key each query may see.

    A key is seen when it is no padding, not in the future, and less than `window`
    tokens back.
    """
    query, key = positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    return mask if window is None else mask & (query - key < window)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute `softmax(q k^T / sqrt(d)) v` where query heads share key heads.

    Args:
        q: `[B, T, heads, d]`.
        k: `[B, S, kv_heads, d]`; query head `h` uses `h // (heads / kv_heads)`.
        v: `[B, S, kv_heads, d]`.
        mask: `bool[B, T, S]`.

    Returns:
        `[B, T, heads, d]`. A query that may see nothing gets a finite, meaningless row.
    """
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(width**-0.5)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum(
        "bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32
    )
    return mixed.astype(v.dtype).reshape(batch, length, heads, width)
