"""What every causal decoder does with positions and a cache, around its layers."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.models.cache import KVCache, LayerCache, append, write

Held = tuple[LayerCache, jax.Array] | None
Layer = Callable[[jax.Array, "Places", Held], tuple[jax.Array, LayerCache | None]]


class Places(NamedTuple):
    """Where the queries and the keys stand.

    Attributes:
        queries: `int[B, T]`, negative for padding.
        keys: `int[B, S]`: the same tokens, or all slots of the cache.
    """

    queries: jax.Array
    keys: jax.Array


def run_layers(
    layers: Iterable[Layer], x: jax.Array, places: Places, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    """Apply layers to the stream `x[B, T, width]`, each with its part of the cache."""
    stored: list[Any] = []
    for index, layer in enumerate(layers):
        held = None if cache is None else (cache.layers[index], cache.start)
        x, kept = layer(x, places, held)
        stored.append(kept)
    return x, None if cache is None else replace(cache, layers=tuple(stored))


def take_places(
    tokens: jax.Array, positions: jax.Array | None, cache: KVCache | None
) -> tuple[Places, KVCache | None]:
    """Return where the tokens stand, and the cache with room made for them.

    Args:
        tokens: `int[B, T]`.
        positions: of the tokens, `int[B, T]`; None goes on from where the cache ends,
            or from 0.
        cache: of earlier tokens.
    """
    if positions is None:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = positions if cache is None else positions + cache.end
        positions = jnp.broadcast_to(positions, tokens.shape)
    if cache is None:
        return Places(positions, positions), None
    cache = append(cache, positions)
    return Places(positions, cache.positions), cache


def remember(
    held: Held, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, LayerCache | None]:
    """Return all keys and values to attend to, and the layer's longer cache."""
    if held is None:
        return k, v, None
    stored = write(held[0], k, v, at=held[1])
    return stored.keys.astype(k.dtype), stored.values.astype(v.dtype), stored


def answer(logits: jax.Array, cache: KVCache | None) -> Any:
    """Return what a causal model returns: logits, and the cache if there is one."""
    return logits if cache is None else (logits, cache)
