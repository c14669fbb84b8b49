"""The key/value cache: a pytree of static shape that generation passes in and out.

Slots are filled in order, the same slot for every row of the batch; what a slot *means*
is the position stored with it. Rows of different length therefore need no bookkeeping:
padding is a slot of negative position, which no query sees.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PADDING = -1  # the position of a slot that nothing may attend to


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's rotated keys, and values: `[batch, slots, kv_heads, head_dim]`."""

    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens a model has seen.

    Attributes:
        layers: one `LayerCache` per decoder layer.
        positions: `int32[batch, slots]`; `PADDING` where a slot is empty or padding.
        start: `int32[]`, the slot at which the latest tokens were written.
        end: `int32[]`, the first free slot.
    """

    layers: tuple[LayerCache, ...]
    positions: jax.Array
    start: jax.Array
    end: jax.Array

    @property
    def slots(self) -> int:
        """How many tokens fit."""
        return self.positions.shape[1]


def empty_cache(config: Any, batch: int, slots: int, dtype: Any) -> KVCache:
    """Return a cache with room for `slots` tokens in each of `batch` rows.

    Args:
        config: of the model: `num_layers`, `num_kv_heads` and `head_dim` are read.
        batch: rows.
        slots: tokens per row, padding included.
        dtype: of keys and values.
    """
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_layers)
    )
    positions = jnp.full((batch, slots), PADDING, jnp.int32)
    return KVCache(layers, positions, jnp.int32(0), jnp.int32(0))


def append(cache: KVCache, positions: jax.Array) -> KVCache:
    """Reserve the next slots for tokens at `positions[batch, tokens]`.

    The caller sees to it that they fit: a slice beyond the end would be moved back by
    XLA and overwrite older tokens.
    """
    start = cache.end
    held = jax.lax.dynamic_update_slice(
        cache.positions, positions.astype(jnp.int32), (jnp.int32(0), start)
    )
    end = start + jnp.int32(positions.shape[1])
    return KVCache(cache.layers, held, start, end)


def write(
    layer: LayerCache, keys: jax.Array, values: jax.Array, at: jax.Array
) -> LayerCache:
    """Return `layer` with `keys` and `values` in the slots from `at` on."""
    zero = jnp.int32(0)
    corner = (zero, at, zero, zero)
    put = jax.lax.dynamic_update_slice
    return LayerCache(
        put(layer.keys, keys.astype(layer.keys.dtype), corner),
        put(layer.values, values.astype(layer.values.dtype), corner),
    )
