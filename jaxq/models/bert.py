"""BERT: an encoder that sees every token, and its head for masked tokens."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.models.activations import ACTIVATIONS
from jaxq.models.attention import attend
from jaxq.models.block import Block, wide_dot
from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.norms import LayerNorm
from jaxq.models.shape import Shape


@dataclass(frozen=True, kw_only=True)
class BertConfig(Shape):
    """The shape of a BERT or RoBERTa.

    Attributes:
        token_types: kinds of segments.
        padding: None where positions count all tokens from 0 (BERT); otherwise they
            count those that the mask keeps, from `padding + 1` (RoBERTa).
    """

    token_types: int = 2
    padding: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the table of positions."""
        return self.context + (0 if self.padding is None else self.padding + 1)


class Embeddings(Block):
    """The sum of what a token, its place and its segment mean, normed."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array, segments: jax.Array
    ) -> jax.Array:
        """Return `[B, T, hidden]`."""
        cfg = self.config
        if cfg.padding is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        else:
            kept = mask.astype(jnp.int32)
            positions = jnp.cumsum(kept, axis=1) * kept + jnp.int32(cfg.padding)
        x = self.table(cfg.vocab_size, cfg.hidden_size, "word_embeddings")(tokens)
        types = self.table(cfg.token_types, cfg.hidden_size, "token_type_embeddings")
        places = self.table(cfg.rows, cfg.hidden_size, "position_embeddings")
        x = x + types(segments) + places(positions)
        return LayerNorm(cfg.norm_eps, name="LayerNorm")(x)


class SelfAttention(Block):
    """Every token attends to every token that is no padding."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the mixed values, `[B, T, hidden]`."""
        cfg = self.config

        def heads(name: str) -> jax.Array:
            flat = self.dense(cfg.hidden_size, name, bias=True)(x)
            return flat.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)

        q, k, v = heads("query"), heads("key"), heads("value")
        return attend(q, k, v, mask[:, None, :]).reshape(x.shape)


class Output(Block):
    """A projection, added to the stream and normed."""

    @nn.compact
    def __call__(self, inner: jax.Array, x: jax.Array) -> jax.Array:
        """Return `norm(x + dense(inner))`."""
        added = x + self.dense(self.config.hidden_size, "dense", bias=True)(inner)
        return LayerNorm(self.config.norm_eps, name="LayerNorm")(added)


class EncoderAttention(Block):
    """Attention and the projection behind it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the normed stream."""
        mixed = self.part(SelfAttention, "self")(x, mask)
        return self.part(Output, "output")(mixed, x)


class Intermediate(Block):
    """`act(dense(x))`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[B, T, intermediate]`."""
        inner = self.dense(self.config.intermediate_size, "dense", bias=True)(x)
        return ACTIVATIONS[self.config.activation](inner)


class EncoderLayer(Block):
    """Attention and feed-forward, each added to the stream, and the sum normed."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the stream `[B, T, hidden]` after this layer."""
        x = self.part(EncoderAttention, "attention")(x, mask)
        inner = self.part(Intermediate, "intermediate")(x)
        return self.part(Output, "output")(inner, x)


class Encoder(Block):
    """All layers."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the stream `[B, T, hidden]` after the last layer."""
        for index in range(self.config.num_layers):
            x = self.part(EncoderLayer, f"layer_{index}", index)(x, mask)
        return x


class Bert(Block):
    """Token ids in, hidden states out."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the last hidden state of every token.

        Args:
            tokens: `int[B, T]`.
            mask: `bool` or `int[B, T]`, 0 for padding; None keeps all.
            segments: `int[B, T]`, which segment each token is of; None is the first.

        Returns:
            `float32[B, T, hidden]`; that of padding means nothing.
        """
        return self.states(tokens, mask, segments)[0].astype(jnp.float32)

    def states(
        self, tokens: jax.Array, mask: jax.Array | None, segments: jax.Array | None
    ) -> tuple[jax.Array, Embeddings]:
        """Return the hidden states, and the embeddings, whose table a head shares."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        segments = jnp.zeros_like(tokens) if segments is None else segments
        embeddings = self.part(Embeddings, "embeddings")
        x = embeddings(tokens, mask, segments)
        return self.part(Encoder, "encoder")(x, mask), embeddings


class Transform(Block):
    """What the head does to a hidden state first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `norm(act(dense(x)))`."""
        x = self.dense(self.config.hidden_size, "dense", bias=True)(x)
        x = ACTIVATIONS[self.config.activation](x)
        return LayerNorm(self.config.norm_eps, name="LayerNorm")(x)


class Predictions(Block):
    """The head for masked tokens, whose matrix is the table of embeddings."""

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Return logits, `float32[B, T, vocab]`."""
        x = self.part(Transform, "transform")(x)
        return with_bias(self, x, table)


class Heads(Block):
    """All heads that BERT was trained with; masked tokens are the one used."""

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Return logits, `float32[B, T, vocab]`."""
        return self.part(Predictions, "predictions")(x, table)


class MaskedBert(Bert):
    """Token ids in, logits of the token at every place out."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the logits of the token at every place, as if it were masked.

        Args:
            tokens: `int[B, T]`.
            mask: `bool` or `int[B, T]`, 0 for padding; None keeps all.
            segments: `int[B, T]`, which segment each token is of; None is the first.

        Returns:
            `float32[B, T, vocab]`.
        """
        x, embeddings = self.states(tokens, mask, segments)
        table = embeddings.variables["params"]["word_embeddings"]["embedding"]
        return self.head(x, table)

    def head(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Return logits of hidden states."""
        return self.part(Heads, "cls")(x, table)


def with_bias(block: Block, x: jax.Array, table: jax.Array) -> jax.Array:
    """Return `x table^T + bias` in float32."""
    bias = block.param("bias", nn.initializers.zeros, (block.config.vocab_size,))
    logits = wide_dot(x, table.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    return logits + bias.astype(jnp.float32)


def read_encoder_shape(keys: Keys) -> dict[str, Any]:
    """Read the sizes that BERT and RoBERTa name alike.

    Raises:
        ConfigError: a size is missing or senseless, or a key is not implemented.
    """
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} must divide hidden_size {hidden}"
        )
    keys.require("is_decoder", False)
    keys.require("add_cross_attention", False)
    keys.require("position_embedding_type", "absolute")
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.size("intermediate_size"),
        "num_layers": keys.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "norm_eps": keys.number("layer_norm_eps", 1e-12),
        "tied": keys.flag("tie_word_embeddings", True),
        "activation": keys.activation("hidden_act", "gelu"),
        "token_types": keys.size("type_vocab_size", 2),
    }


def read_bert(keys: Keys) -> BertConfig:
    """Read the config of a BERT.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    context = keys.size("max_position_embeddings", 512)
    return BertConfig(**read_encoder_shape(keys), context=context)


def read_masked_bert(keys: Keys) -> BertConfig:
    """Read the config of a BERT whose head is its table of embeddings.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    keys.require("tie_word_embeddings", True)
    return read_bert(keys)
