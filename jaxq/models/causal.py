"""What every causal decoder does with positions and a cache, around its layers."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.kvcache import Cache, LayerCache, QuantizedLayer
from jaxq.kvcache.attention import Problem
from jaxq.kvcache.attention import attend as attend_to_codes
from jaxq.models.attention import attend, visible

# a layer's part of a cache, and None without a cache
Kept = LayerCache | QuantizedLayer | None
# that, and where in it the latest tokens go
Held = tuple[LayerCache | QuantizedLayer, jax.Array] | None
Layer = Callable[[jax.Array, "Places", Held], tuple[jax.Array, Kept]]


class Places(NamedTuple):
    """Where the queries and the keys stand.

    Attributes:
        queries: `int[B, T]`, negative for padding.
        keys: `int[B, S]`: the same tokens, or all slots of the cache.
        slots: where the tokens go in the cache; None without one.
    """

    queries: jax.Array
    keys: jax.Array
    slots: jax.Array | None = None


def run_layers(
    layers: Iterable[Layer], x: jax.Array, places: Places, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """Apply layers to the stream `x[B, T, width]`, each with its part of the cache."""
    stored: list[Any] = []
    for index, layer in enumerate(layers):
        held: Any = None if cache is None else (cache.layers[index], places.slots)
        x, kept = layer(x, places, held)
        stored.append(kept)
    return x, None if cache is None else replace(cache, layers=tuple(stored))


def take_places(
    tokens: jax.Array, positions: jax.Array | None, cache: Cache | None
) -> tuple[Places, Cache | None]:
    """Return where the tokens stand, and the cache with room made for them.

    Args:
        tokens: `int[B, T]`.
        positions: of the tokens, `int[B, T]`; None goes on from where the cache ends,
            or from 0.
        cache: of earlier tokens.
    """
    if positions is None:
        count = tokens.shape[1]
        first = jnp.arange(count, dtype=jnp.int32)
        positions = first if cache is None else cache.next_positions(count)
        positions = jnp.broadcast_to(positions, tokens.shape)
    if cache is None:
        return Places(positions, positions), None
    cache, slots = cache.append(positions)
    return Places(positions, cache.positions, slots), cache


def attend_and_keep(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    places: Places,
    held: Held,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, Kept]:
    """Add keys and values to the layer's cache, and attend to all that it holds.

    Args:
        qkv: queries `[B, T, heads, d]`, keys and values `[B, T, kv_heads, d]`.
        places: where they stand.
        held: the layer's part of the cache; None attends to the tokens themselves.
        window: how many tokens back a query sees; None sees all.
        scale: see `jaxq.models.attention.attend`, as for `cap` and `bias`.
        cap: bounds the scores.
        bias: added to them.

    Returns:
        `[B, T, heads, d]`, and the layer's longer cache.
    """
    q, k, v = qkv
    if held is None:
        mask = visible(places.queries, places.keys, window)
        return attend(q, k, v, mask, scale=scale, bias=bias, cap=cap), None
    stored = held[0].write(k, v, held[1])
    if isinstance(stored, QuantizedLayer):
        problem = Problem(
            q, stored, places.queries, places.keys, window, scale, cap, bias
        )
        return attend_to_codes(problem)
    mask = visible(places.queries, places.keys, window)
    k, v = stored.keys.astype(k.dtype), stored.values.astype(v.dtype)
    return attend(q, k, v, mask, scale=scale, bias=bias, cap=cap), stored


def answer(logits: jax.Array, cache: Cache | None) -> Any:
    """Return what a causal model returns: logits, and the cache if there is one."""
    return logits if cache is None else (logits, cache)
