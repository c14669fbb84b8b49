"""The cache of floats: slots filled in order, the same slot for every row of a batch.

What a slot *means* is the position stored with it. Rows of different length therefore
need no bookkeeping: padding is a slot of negative position, which no query sees.
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from jaxq.kvcache.positions import PADDING


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's rotated keys, and values: `[batch, slots, kv_heads, head_dim]`."""

    keys: jax.Array
    values: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, at: jax.Array) -> Self:
        """Return it with `keys` and `values` in the slots from `at` on."""
        zero = jnp.int32(0)
        corner = (zero, at, zero, zero)
        put = jax.lax.dynamic_update_slice
        return type(self)(
            put(self.keys, keys.astype(self.keys.dtype), corner),
            put(self.values, values.astype(self.values.dtype), corner),
        )


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

    def next_positions(self, tokens: int) -> jax.Array:
        """Return where so many tokens go on, `int32[batch or 1, tokens]`."""
        return (jnp.arange(tokens, dtype=jnp.int32) + self.end)[None]

    def append(self, positions: jax.Array) -> tuple[Self, jax.Array]:
        """Reserve the next slots for tokens at `positions[batch, tokens]`.

        The caller sees to it that they fit: a slice beyond the end would be moved back
        by XLA and overwrite older tokens.

        Returns:
            The cache, and where `LayerCache.write` puts the tokens: the first slot.
        """
        start = self.end
        held = jax.lax.dynamic_update_slice(
            self.positions, positions.astype(jnp.int32), (jnp.int32(0), start)
        )
        end = start + jnp.int32(positions.shape[1])
        return type(self)(self.layers, held, start, end), start


def float_cache(config: Any, batch: int, slots: int, dtype: Any) -> KVCache:
    """Return an empty cache of floats; see `jaxq.kvcache.empty_cache`."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_layers)
    )
    positions = jnp.full((batch, slots), PADDING, jnp.int32)
    return KVCache(layers, positions, jnp.int32(0), jnp.int32(0))
