"""Attention over a cache of int8 or int4 codes in plain XLA, block by block.

    o = Σ_s p_s ν_s v_s,   p = softmax_s(cap(κ_s (q · k_s) · scale) + bias_s)

with codes k, v and their scales κ, ν, one per token and head. A block of tokens is
converted, multiplied and forgotten; a running maximum and sum join the blocks, so there
is never a float copy of the cache. Blocks behind the longest row are not read.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256  # tokens that are converted at once

Carry = tuple[jax.Array, jax.Array, jax.Array]


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_scales: jax.Array,
    value_scales: jax.Array,
    positions: jax.Array,
    key_positions: jax.Array,
    lengths: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    bias: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Return causal attention of the queries to what the cache holds.

    Args:
        q: ``[B, T, H, D]``, any float dtype; head h reads the cache's ``h // (H / K)``.
        keys: int8 or int4 ``[B, K, S, D]``, or uint8 ``[B, K, S, D / 2]``: codes plus 8
            of the channels d (low half) and ``d + D / 2`` (high half).
        values: like ``keys``.
        key_scales: float32 ``[B, K, S]``.
        value_scales: like ``key_scales``.
        positions: int ``[B, T]``, where the queries stand.
        key_positions: int ``[B, S]``, where the cached tokens stand; negative: nothing.
        lengths: int ``[B]``; slots from there on are empty.
        window: how many tokens back a query sees, itself included; None: all.
        scale: of the scores; None is ``D ** -0.5``.
        cap: scores s become ``cap tanh(s / cap)``.
        bias: added to them, float ``[B or 1, H, T or 1, S]``.
        block: tokens that are converted at once.

    Returns:
        ``[B, T, H, D]`` in the dtype of ``q``; zeros where a query sees nothing.

    Example:
        >>> one = jnp.ones((1, 1, 2, 4), jnp.int8)
        >>> y = cached_attention(
        ...     jnp.ones((1, 1, 1, 4)), one, one, jnp.ones((1, 1, 2)),
        ...     jnp.asarray([[[1.0, 3.0]]]), jnp.ones((1, 1), int),
        ...     jnp.asarray([[0, 1]]), jnp.asarray([2]))
        >>> y[0, 0, 0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """  # fmt: skip
    batch, tokens, heads, width = q.shape
    cached, slots = keys.shape[1:3]
    block = min(block, slots)
    share = (batch, cached, heads // cached, tokens)
    queries = q.reshape(batch, tokens, cached, heads // cached, width)
    queries = queries.transpose(0, 2, 3, 1, 4)
    factor = jnp.float32(width**-0.5 if scale is None else scale)
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape(
            bias.shape[0], cached, heads // cached, *bias.shape[2:]
        )

    def step(number: jax.Array, carry: Carry) -> Carry:
        first = number * block
        start = jnp.minimum(first, slots - block)  # the last block may overlap

        def here(a: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, start, block, axis)

        k, v = (numbers(here(a, 2), width, q.dtype) for a in (keys, values))
        scores = jnp.einsum(
            "bkgtd,bksd->bkgts", queries, k, preferred_element_type=jnp.float32
        )
        scores = scores * (here(key_scales, 2) * factor)[:, :, None, None]
        if cap is not None:
            scores = jnp.tanh(scores / jnp.float32(cap)) * jnp.float32(cap)
        if bias is not None:
            scores = scores + here(bias, 4)
        query, key = positions[:, :, None], here(key_positions, 1)[:, None]
        seen = (key >= 0) & (key <= query)
        seen &= start + jnp.arange(block, dtype=jnp.int32) >= first
        if window is not None:
            seen &= query - key < window
        return _join(carry, scores, seen[:, None, None], v, here(value_scales, 2))

    zeros = jnp.zeros((*share, 1), jnp.float32)
    begin = zeros + jnp.finfo(jnp.float32).min, zeros, zeros * jnp.zeros(width)
    blocks = (jnp.max(lengths).astype(jnp.int32) + (block - 1)) // block
    _, total, mixed = lax.fori_loop(0, blocks, step, begin)
    mixed = mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _join(
    carry: Carry, scores: jax.Array, seen: jax.Array, v: jax.Array, scales: jax.Array
) -> Carry:
    """Take one block of scores ``[B, K, G, T, S]`` into the running softmax."""
    top, total, mixed = carry
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    new = jnp.maximum(top, jnp.max(scores, -1, keepdims=True))
    kept = jnp.exp(top - new)
    weights = jnp.where(seen, jnp.exp(scores - new), jnp.float32(0))
    scaled = (weights * scales[:, :, None, None]).astype(v.dtype)
    part = jnp.einsum(
        "bkgts,bksd->bkgtd", scaled, v, preferred_element_type=jnp.float32
    )
    total = total * kept + jnp.sum(weights, -1, keepdims=True)
    return new, total, mixed * kept + part


def numbers(codes: jax.Array, width: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return codes of heads of ``width`` channels as floats, which hold them exactly.

    Args:
        codes: int8 or int4 ``[..., D]``, or two in a byte, uint8 ``[..., D / 2]``.
        width: D.
        dtype: of the result.
    """
    if codes.dtype != jnp.uint8:
        return codes.astype(dtype)
    both = jnp.concatenate([codes & jnp.uint8(15), codes >> 4], axis=-1)
    return both[..., :width].astype(dtype) - jnp.asarray(8, dtype)
