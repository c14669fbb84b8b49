"""T5: an encoder and a decoder, with positions as a bias of the scores."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import CrossCache, KVCache, LayerCache
from jaxq.models.activations import ACTIVATIONS
from jaxq.models.attention import attend, visible
from jaxq.models.block import Block
from jaxq.models.causal import Places, take_places
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


# what a decoder layer attends to: what the encoder returned, or its keys and values
Source = jax.Array | LayerCache
# what a decoder layer keeps of its own text, and of the source
Kept = tuple[LayerCache | None, LayerCache]
# a layer's part of a cache, and where in it the latest tokens go
Held = tuple[LayerCache, jax.Array] | None


class Sight(NamedTuple):
    """What a layer's queries see of their own text.

    Attributes:
        mask: `bool[B, T or 1, S]`.
        buckets: `int[T, S]`, which row of the bias a pair of places takes.
        bias: `[1, heads, T, S]`, made by the first layer.
    """

    mask: jax.Array
    buckets: jax.Array
    bias: jax.Array | None = None


class T5Attention(Block):
    """Attention whose scores are not scaled."""

    def heads(self, name: str, x: jax.Array) -> jax.Array:
        """Return a projection of `x[B, T, hidden]`, `[B, T, heads, head_dim]`."""
        cfg = self.config
        flat = self.dense(cfg.num_heads * cfg.head_dim, name)(x)
        return flat.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)

    def mix(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        mask: jax.Array,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Return the projected mix of values, `[B, T, hidden]`."""
        q, k, v = qkv
        mixed = attend(
            q, k.astype(q.dtype), v.astype(q.dtype), mask, scale=1.0, bias=bias
        )
        return self.dense(self.config.hidden_size, "o")(mixed.reshape(*q.shape[:2], -1))


class SelfAttention(T5Attention):
    """Attention to the text itself."""

    @nn.compact
    def __call__(
        self, x: jax.Array, sight: Sight, held: Held = None
    ) -> tuple[jax.Array, Sight, LayerCache | None]:
        """Attend from `x[B, T, hidden]` to itself, or to the cache it is added to.

        Returns:
            The projected mix, the sight with its bias, and the layer's longer cache.
        """
        cfg = self.config
        if sight.bias is None:  # the first layer makes it for all
            table = self.table(cfg.buckets, cfg.num_heads, "relative_attention_bias")
            sight = sight._replace(bias=table(sight.buckets).transpose(2, 0, 1)[None])
        q, k, v = (self.heads(name, x) for name in "qkv")
        kept = None
        if held is not None:
            kept = held[0].write(k, v, held[1])
            k, v = kept.keys, kept.values
        return self.mix((q, k, v), sight.mask, sight.bias), sight, kept


class CrossAttention(T5Attention):
    """Attention to what the encoder has read."""

    @nn.compact
    def __call__(
        self, x: jax.Array, source: Source, seen: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Attend from `x[B, T, hidden]` to the source.

        Returns:
            The projected mix, and the source's keys and values.
        """
        q = self.heads("q", x)
        if not isinstance(source, LayerCache):
            source = LayerCache(self.heads("k", source), self.heads("v", source))
        return self.mix((q, source.keys, source.values), seen), source


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


class FeedForwardPart(Block):
    """The feed-forward layer, added to the stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the stream."""
        normed = RMSNorm(self.config.norm_eps, name="layer_norm")(x)
        return x + self.part(T5FeedForward, "DenseReluDense")(normed)


class SelfPart(Block):
    """Attention to the text itself, added to the stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, sight: Sight, held: Held = None
    ) -> tuple[jax.Array, Sight, LayerCache | None]:
        """Return the stream, the sight, and the layer's longer cache."""
        normed = RMSNorm(self.config.norm_eps, name="layer_norm")(x)
        attention = self.part(SelfAttention, "SelfAttention")
        mixed, sight, kept = attention(normed, sight, held)
        return x + mixed, sight, kept


class CrossPart(Block):
    """Attention to what the encoder has read, added to the stream."""

    @nn.compact
    def __call__(
        self, x: jax.Array, source: Source, seen: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Return the stream, and the source's keys and values."""
        normed = RMSNorm(self.config.norm_eps, name="layer_norm")(x)
        attention = self.part(CrossAttention, "EncDecAttention")
        mixed, read = attention(normed, source, seen)
        return x + mixed, read


class EncoderLayer(Block):
    """One layer of the encoder."""

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight) -> tuple[jax.Array, Sight]:
        """Return the stream and the sight."""
        x, sight, _ = self.part(SelfPart, "layer_0")(x, sight)
        return self.part(FeedForwardPart, "layer_1")(x), sight


class DecoderLayer(Block):
    """One layer of the decoder."""

    @nn.compact
    def __call__(
        self, x: jax.Array, sight: Sight, held: Held, source: Source, seen: jax.Array
    ) -> tuple[jax.Array, Sight, Kept]:
        """Return the stream, the sight, and what is kept of both attentions."""
        x, sight, kept = self.part(SelfPart, "layer_0")(x, sight, held)
        x, read = self.part(CrossPart, "layer_1")(x, source, seen)
        return self.part(FeedForwardPart, "layer_2")(x), sight, (kept, read)


class Encoder(Block):
    """What reads the text."""

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        """Return the normed stream `[B, S, hidden]` after the last layer.

        Args:
            x: embeddings, `[B, S, hidden]`.
            seen: `bool[B, 1, S]`, by every place alike.
        """
        cfg, place = self.config, jnp.arange(x.shape[1], dtype=jnp.int32)
        buckets = position_buckets(
            place[None] - place[:, None], cfg.buckets, cfg.reach, both=True
        )
        sight = Sight(seen, buckets)
        for index in range(cfg.num_layers):
            x, sight = self.part(EncoderLayer, f"block_{index}", index)(x, sight)
        return RMSNorm(cfg.norm_eps, name="final_layer_norm")(x)


class Decoder(Block):
    """What writes."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        places: Places,
        written: KVCache | None,
        sources: Source | tuple[LayerCache, ...],
        seen: jax.Array,
    ) -> tuple[jax.Array, tuple[Kept, ...]]:
        """Return the normed stream `[B, T, hidden]`, and what each layer keeps.

        Args:
            x: embeddings of what is written, `[B, T, hidden]`.
            places: where it stands.
            written: keys and values of what was written before.
            sources: what the encoder returned, or its keys and values per layer.
            seen: `bool[B, 1, S]`, what of it is no padding.
        """
        cfg = self.config
        # rows are written in step, so that the first one's distances are all rows'
        distance = places.keys[0, None] - places.queries[0, :, None]
        buckets = position_buckets(distance, cfg.buckets, cfg.reach, both=False)
        sight = Sight(visible(places.queries, places.keys, None), buckets)
        stored: list[Kept] = []
        for index in range(cfg.decoder_layers):
            held: Any = written and (written.layers[index], places.slots)
            source = sources[index] if isinstance(sources, tuple) else sources
            layer = self.part(DecoderLayer, f"block_{index}", index)
            x, sight, kept = layer(x, sight, held, source, seen)
            stored.append(kept)
        return RMSNorm(cfg.norm_eps, name="final_layer_norm")(x), tuple(stored)


class T5(Block):
    """A text and the beginning of another in, logits of its next tokens out."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None,
        targets: jax.Array,
        mask: jax.Array | None = None,
        cache: CrossCache | None = None,
    ) -> Any:
        """Compute the logits of the token after every given token of the target.

        Args:
            tokens: `int[B, S]`, the text that is read; None goes on with the text that
                is in the cache.
            targets: `int[B, T]`, the text that is written, from its start token on, or
                from where the cache ends.
            mask: `bool` or `int[B, S]`, 0 for padding of `tokens`; None keeps all.
            cache: of what was written before, to which this is added.

        Returns:
            `float32[B, T, vocab]`; with a cache, that and the longer cache.

        Raises:
            ValueError: there is no text.
        """
        cfg = self.config
        embed = self.table(cfg.vocab_size, cfg.hidden_size, "shared")
        sources, seen = self.read(embed, tokens, mask, cache)
        before = None if cache is None else cache.written
        places, taken = take_places(targets, None, before)
        written = cast(KVCache | None, taken)
        decoder = self.part(Decoder, "decoder")
        x, stored = decoder(embed(targets), places, written, sources, seen)
        if written is not None:
            own, read = zip(*stored, strict=True)
            cache = CrossCache(replace(written, layers=own), read, seen)
        if cfg.scaled:
            x = (x.astype(jnp.float32) * jnp.float32(cfg.hidden_size**-0.5)).astype(
                x.dtype
            )
        logits = self.logits(x, embed)
        return logits if cache is None else (logits, cache)

    def read(
        self,
        embed: nn.Embed,
        tokens: jax.Array | None,
        mask: jax.Array | None,
        cache: CrossCache | None,
    ) -> tuple[Source | tuple[LayerCache, ...], jax.Array]:
        """Return what the decoder attends to, and `bool[B, 1, S]`, which of it."""
        if tokens is not None:
            seen = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
            seen = seen[:, None]
            return self.part(Encoder, "encoder")(embed(tokens), seen), seen
        if cache is None or cache.read is None or cache.seen is None:
            raise ValueError(
                "tokens is None, and no text is in the cache; give the text with the "
                "first tokens that are written"
            )
        return cache.read, cache.seen


def position_buckets(
    distance: jax.Array, buckets: int, reach: int, both: bool
) -> jax.Array:
    """Return which row of the bias each pair of places takes, of the shape given.

    Half of the buckets are single distances, the others grow geometrically up to
    `reach`. An encoder has as many again for keys behind the query.

    Args:
        distance: `int`, of the key from the query.
        buckets: rows of the table.
        reach: distances from here on share a bucket.
        both: whether keys behind the query are seen.
    """
    if both:
        buckets //= 2
        behind = (distance > 0).astype(jnp.int32) * buckets
        return behind + _bucket_of(jnp.abs(distance), buckets, reach)
    return _bucket_of(jnp.maximum(-distance, 0), buckets, reach)


def _bucket_of(distance: jax.Array, buckets: int, reach: int) -> jax.Array:
    """Return the buckets of distances `>= 0`.

    They are looked up: a logarithm's last bit may decide, and compilers differ in it.
    """
    every = np.arange(reach + 1)
    exact = buckets // 2
    share = np.log(np.maximum(every, 1).astype(np.float32) / exact)
    share = share / np.log(np.float32(reach / exact)) * (buckets - exact)
    far = np.minimum(exact + share.astype(np.int64), buckets - 1)
    table = np.where(every < exact, every, far)
    return jnp.asarray(table, jnp.int32)[jnp.minimum(distance, reach)]


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
