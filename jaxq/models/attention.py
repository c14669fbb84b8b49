"""Attention: which keys a query sees, and the weighted sum of their values."""

import jax
import jax.numpy as jnp
import numpy as np


def visible(
    positions: jax.Array, key_positions: jax.Array, window: int | None
) -> jax.Array:
    """Return `bool[B, T, S]`: which key each query of a causal model may see.

    A key is seen when it is no padding, not in the future, and less than `window`
    tokens back.
    """
    query, key = positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    return mask if window is None else mask & (query - key < window)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Compute `softmax(cap(q k^T scale) + bias) v` where query heads share key heads.

    Args:
        q: `[B, T, heads, d]`.
        k: `[B, S, kv_heads, d]`; query head `h` uses `h // (heads / kv_heads)`.
        v: `[B, S, kv_heads, d]`.
        mask: `bool[B or 1, T or 1, S]`.
        scale: of the scores; None is `1 / sqrt(d)`.
        bias: added to them, `[B or 1, heads, T or 1, S]`.
        cap: scores `s` become `cap tanh(s / cap)` (Gemma 2).

    Returns:
        `[B, T, heads, d]`. A query that may see nothing gets a finite, meaningless row.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    # Heads first, so that the scores come out as the softmax walks them: moved
    # afterwards, they cost more than both products.
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(width**-0.5 if scale is None else scale)
    if cap is not None:
        scores = jnp.tanh(scores / jnp.float32(cap)) * jnp.float32(cap)
    if bias is not None:
        wide = bias.astype(jnp.float32)
        scores += wide.reshape(
            bias.shape[0], kv_heads, heads // kv_heads, *bias.shape[2:]
        )
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    # The softmax's division comes last, where there is the least to divide.
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    mixed = jnp.einsum(
        "bkgts,bksd->bkgtd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    mixed = mixed.astype(v.dtype).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, width)


def alibi_slopes(heads: int) -> np.ndarray:
    """Return how much each head is told to prefer near keys, `float32[heads]`.

    For a power of two, `2 ** (-8 h / heads)` for `h = 1 .. heads`; for other numbers
    every other slope of the next power follows those of the last (arXiv:2108.12409).
    """
    whole = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * whole + 1, 2) / (2 * whole))
    return np.concatenate([slopes, between])[:heads].astype(np.float32)


def alibi(heads: int, key_positions: jax.Array) -> jax.Array:
    """Return `slope[h] * position` of every key, `float32[B, heads, 1, S]`.

    The softmax takes away what all keys share, so this is the distance from the query.
    """
    slopes = jnp.asarray(alibi_slopes(heads))[None, :, None, None]
    return slopes * key_positions.astype(jnp.float32)[:, None, None, :]
