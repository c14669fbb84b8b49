"""T5: an encoder and a decoder, with positions as a bias of the scores."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.models.activations import ACTIVATIONS
from jaxq.models.attention import attend
from jaxq.models.block import Block
from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.norms import RMSNorm
from jaxq.models.shape import Shape

ANY_CONTEXT = 512  # relative positions have no limit; T5 was trained on such texts


@dataclass(frozen=True, kw_only=True)
class T5Config(Shape):
    """The shape of a T5.

    Attributes:
        decoder_layers: layers of the decoder; `num_layers` are the encoder's.
        buckets: rows of the tables of position biases.
        reach: distances from here on share a bucket.
        gated: the feed-forward layers have two first projections.
        scaled: hidden states are divided by the root of their width before the head.
        start: the token that begins what the decoder writes.
    """

    decoder_layers: int
    buckets: int = 32
    reach: int = 128
    gated: bool = False
    scaled: bool = True
    start: int = 0


class T5Attention(Block):
    """Attention whose scores are not scaled."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
        buckets: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attend from `x` to `source`.

        Args:
            x: `[B, T, hidden]`.
            source: `[B, S, hidden]`.
            mask: `bool[B or 1, T or 1, S]`.
            bias: of an earlier layer, `[1, heads, T, S]`; or None.
            buckets: `int[T, S]` where this layer makes the bias, else None.

        Returns:
            The projected mix, and the bias for the layers behind.
        """
        cfg = self.config
        width = cfg.num_heads * cfg.head_dim

        def heads(name: str, of: jax.Array) -> jax.Array:
            flat = self.dense(width, name)(of)
            return flat.reshape(*of.shape[:2], cfg.num_heads, cfg.head_dim)

        if buckets is not None:
            table = self.table(cfg.buckets, cfg.num_heads, "relative_attention_bias")
            bias = table(buckets).transpose(2, 0, 1)[None]
        q, k, v = heads("q", x), heads("k", source), heads("v", source)
        mixed = attend(q, k, v, mask, scale=1.0, bias=bias)
        return self.dense(cfg.hidden_size, "o")(mixed.reshape(*x.shape[:2], -1)), bias


class T5FeedForward(Block):
    """`wo(act(wi(x)))`, or `wo(act(wi_0(x)) * wi_1(x))`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        cfg = self.config
        act = ACTIVATIONS[cfg.activation]
        if cfg.gated:
            inner = act(self.dense(cfg.intermediate_size, "wi_0")(x))
            inner = inner * self.dense(cfg.intermediate_size, "wi_1")(x)
        else:
            inner = act(self.dense(cfg.intermediate_size, "wi")(x))
        return self.dense(cfg.hidden_size, "wo")(inner)


class SelfPart(Block):
    """Attention to the text itself, added to the stream."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None,
        buckets: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the stream and the bias."""
        normed = RMSNorm(self.config.norm_eps, name="layer_norm")(x)
        attention = self.part(T5Attention, "SelfAttention")
        mixed, bias = attention(normed, normed, mask, bias, buckets)
        return x + mixed, bias


class CrossPart(Block):
    """Attention to what the encoder says, added to the stream."""

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the stream."""
        normed = RMSNorm(self.config.norm_eps, name="layer_norm")(x)
        mixed, _ = self.part(T5Attention, "EncDecAttention")(normed, source, mask)
        return x + mixed


class FeedForwardPart(Block):
    """The feed-forward layer, added to the stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the stream."""
        normed = RMSNorm(self.config.norm_eps, name="layer_norm")(x)
        return x + self.part(T5FeedForward, "DenseReluDense")(normed)


class T5Layer(Block):
    """One layer of the encoder, or of the decoder where there is a source."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None,
        buckets: jax.Array | None,
        source: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the stream and the bias."""
        x, bias = self.part(SelfPart, "layer_0")(x, mask, bias, buckets)
        if source is None:
            return self.part(FeedForwardPart, "layer_1")(x), bias
        x = self.part(CrossPart, "layer_1")(x, *source)
        return self.part(FeedForwardPart, "layer_2")(x), bias


class Stack(Block):
    """The encoder."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        source: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Return the normed stream `[B, T, hidden]` after the last layer."""
        cfg, length = self.config, x.shape[1]
        both = source is None
        first: jax.Array | None = position_buckets(length, cfg.buckets, cfg.reach, both)
        bias = None
        for index in range(self.depth()):
            layer = self.part(T5Layer, f"block_{index}", index)
            x, bias = layer(x, mask, bias, first, source)
            first = None  # the first layer makes the bias for all
        return RMSNorm(cfg.norm_eps, name="final_layer_norm")(x)

    def depth(self) -> int:
        """Return the number of layers."""
        return self.config.num_layers


class DecoderStack(Stack):
    """The decoder."""

    def depth(self) -> int:
        """Return the number of layers."""
        return self.config.decoder_layers


class T5(Block):
    """A text and the beginning of another in, logits of its next tokens out."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, targets: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Compute the logits of the token after every given token of the target.

        Args:
            tokens: `int[B, S]`, the text that is read.
            targets: `int[B, T]`, the text that is written, from its start token on.
            mask: `bool` or `int[B, S]`, 0 for padding of `tokens`; None keeps all.

        Returns:
            `float32[B, T, vocab]`.
        """
        cfg, length = self.config, targets.shape[1]
        embed = self.table(cfg.vocab_size, cfg.hidden_size, "shared")
        seen = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        seen = seen[:, None]  # by every place alike
        read = self.part(Stack, "encoder")(embed(tokens), seen)
        past = jnp.tril(jnp.ones((length, length), bool))[None]
        decoder = self.part(DecoderStack, "decoder")
        x = decoder(embed(targets), past, (read, seen))
        if cfg.scaled:
            x = (x.astype(jnp.float32) * jnp.float32(cfg.hidden_size**-0.5)).astype(
                x.dtype
            )
        return self.logits(x, embed)


def position_buckets(length: int, buckets: int, reach: int, both: bool) -> jax.Array:
    """Return which row of the bias each pair of places takes, `int[T, T]`.

    Half of the buckets are single distances, the others grow geometrically up to
    `reach`. An encoder has as many again for keys behind the query.

    Args:
        length: tokens of the text.
        buckets: rows of the table.
        reach: distances from here on share a bucket.
        both: whether keys behind the query are seen.
    """
    place = np.arange(length)
    distance = place[None, :] - place[:, None]  # of the key from the query
    offset = np.zeros_like(distance)
    if both:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = buckets // 2
    share = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    share = share / np.log(np.float32(reach / exact)) * (buckets - exact)
    far = np.minimum(exact + share.astype(np.int64), buckets - 1)
    return jnp.asarray(offset + np.where(distance < exact, distance, far), jnp.int32)


def read_t5(keys: Keys) -> T5Config:
    """Read the config of a T5, 1.1, or Flan.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    heads, layers = keys.size("num_heads"), keys.count("num_layers")
    name, gated = _activation(keys)
    tied = keys.flag("tie_word_embeddings", True)
    # transformers 5 writes this, and always says that the head is tied
    scaled = keys.flag("scale_decoder_outputs", tied)
    keys.require("is_decoder", False, True)
    keys.get("n_positions")  # of the texts it was trained on; there is no limit
    for key in ("dense_act_fn", "is_gated_act"):  # say what feed_forward_proj says
        keys.get(key)
    return T5Config(
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("d_model"),
        intermediate_size=keys.size("d_ff"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=keys.size("d_kv"),
        context=ANY_CONTEXT,
        norm_eps=keys.number("layer_norm_epsilon", 1e-6) or 0.0,
        tied=tied and scaled,
        activation=name,
        decoder_layers=keys.count("num_decoder_layers", layers),
        buckets=keys.size("relative_attention_num_buckets", 32),
        reach=keys.size("relative_attention_max_distance", 128),
        gated=gated,
        scaled=scaled,
        start=keys.get("decoder_start_token_id", 0),
    )


def _activation(keys: Keys) -> tuple[str, bool]:
    """Return the name of the activation, and whether the layer is gated."""
    written = keys.get("feed_forward_proj", "relu")
    name = str(written).removeprefix("gated-")
    gated = str(written).startswith("gated-")
    if gated and name == "gelu":
        name = "gelu_new"  # that is what it has always meant
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: 'feed_forward_proj' is {written!r}, which changes the "
            f"computation; implemented are {', '.join(ACTIVATIONS)}, also 'gated-'"
        )
    return name, gated
