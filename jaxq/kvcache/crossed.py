"""The cache of a decoder that attends to what an encoder has read, too."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from jaxq.kvcache.floating import KVCache, LayerCache, float_cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache:
    """Keys and values of what was written, and of the text that was read.

    Attributes:
        written: of the decoder's own tokens.
        read: of the text, projected once, one `LayerCache` per decoder layer; None
            until a text is read.
        seen: `bool[batch, 1, text]`, what of the text is no padding.
    """

    written: KVCache
    read: tuple[LayerCache, ...] | None = None
    seen: jax.Array | None = None


def cross_cache(config: Any, batch: int, slots: int, dtype: Any) -> CrossCache:
    """Return an empty cache with room for `slots` written tokens in each row.

    Args:
        config: of the model: `decoder_layers`, `num_kv_heads` and `head_dim` are read.
        batch: rows.
        slots: tokens per row, the one that begins a text included.
        dtype: of keys and values.
    """
    decoder = dataclasses.replace(config, num_layers=config.decoder_layers)
    return CrossCache(float_cache(decoder, batch, slots, dtype))
