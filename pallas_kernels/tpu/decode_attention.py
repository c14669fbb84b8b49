"""Attention of one new token over a cache of int8 or int4 keys and values.

The cache is read once, as it is stored: its scales multiply scores and probabilities,
one number per position and head, not keys and values. Blocks behind the last position
of a sequence are neither copied nor multiplied, nor are those before its first one:
with a window, the grid has as many blocks as it can touch, and begins at its first.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.reference import elements

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Tile:
    """Positions per block, times the heads of the cache, at most."""

    positions: int = 8192


TILES = (Tile(8192), Tile(4096), Tile(16384))


def decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_scales: jax.Array,
    value_scales: jax.Array,
    lengths: jax.Array,
    layer: jax.Array | None = None,
    *,
    starts: jax.Array | None = None,
    bias: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    tile: Tile = TILES[0],
    interpret: Any = False,
) -> jax.Array:
    """Return ``softmax(cap(scale · q (k · s_k)ᵀ) + bias) (v · s_v)``.

    Args:
        q: ``[B, H, D]``, any float dtype; H is a multiple of the cache's heads.
        keys: int8 or int4 ``[B, heads, S, D]``; ``[L, B, heads, S, D]`` with a layer.
        values: like ``keys``.
        key_scales: float32 ``[B, heads, S]`` or ``[L, B, heads, S]``.
        value_scales: like ``key_scales``.
        lengths: int32 ``[B]``: how many positions of a sequence count; 0 gives zeros.
        layer: int32 scalar: which part of the stacks, or None.
        starts: int32 ``[B]``: the first position that counts; by default 0.
        bias: float32 ``[B or 1, H, S]``, added to the scores.
        window: only so many positions before a sequence's end count; None: all.
        scale: of the scores; ``D ** -0.5`` by default.
        cap: scores s become ``cap tanh(s / cap)``.
        tile: the largest block.
        interpret: as `jax.experimental.pallas.pallas_call` takes it.

    Returns:
        ``[B, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: when the heads of ``q`` are no multiple of those of the cache.
    """
    stacks = [keys, values, key_scales, value_scales]
    if layer is None:
        stacks, layer = [a[None] for a in stacks], jnp.int32(0)
    batch, heads, width = q.shape
    cached, positions = stacks[0].shape[2:4]
    if heads % cached:
        raise ValueError(
            f"q has {heads} heads, no multiple of the cache's {cached}: every head of "
            f"the cache serves as many heads of q"
        )
    block = _block(positions, max(tile.positions // cached, 128), window)
    blocks = -(-positions // block)
    begins = starts is not None or window is not None
    starts = jnp.zeros_like(lengths) if starts is None else starts
    if window is not None:
        starts = jnp.maximum(starts, lengths - window)
        blocks = min(blocks, -(-(window - 1) // block) + 1)
    queries = q.reshape(batch, cached, heads // cached, width).astype(jnp.float32)
    queries = queries * (width**-0.5 if scale is None else scale)
    rows = -(-queries.shape[2] // 16) * 16
    pad = ((0, 0), (0, 0), (0, rows - queries.shape[2]), (0, 0))
    queries = jnp.pad(queries, pad).astype(jnp.bfloat16)

    def here(b: Any, j: Any, first: Any, ends: Any) -> Any:
        """Return block j that counts, or the last one: then nothing is copied."""
        last = lax.div(jnp.maximum(ends[b] - 1, 0), block)
        return jnp.minimum(lax.div(first[b], block) + j, last)

    cache = pl.BlockSpec(
        (None, None, cached, block, width),
        lambda b, j, layer, *ends: (layer[0], b, 0, here(b, j, *ends), 0),
    )
    scales = pl.BlockSpec(
        (None, None, cached, block),
        lambda b, j, layer, *ends: (layer[0], b, 0, here(b, j, *ends)),
    )
    query = pl.BlockSpec((None, cached, rows, width), lambda b, j, *_: (b, 0, 0, 0))
    added = [] if bias is None else [_per_row(bias, cached, rows)]
    shared = bias is not None and bias.shape[0] == 1
    of_bias = [
        pl.BlockSpec(
            (None, a.shape[1], block),
            lambda b, j, layer, *ends: (0 if shared else b, 0, here(b, j, *ends)),
        )
        for a in added
    ]
    out = pl.pallas_call(
        functools.partial(_body, block, cap, begins),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, blocks),
            in_specs=[query, cache, cache, scales, scales, *of_bias],
            out_specs=query,
            scratch_shapes=[
                pltpu.VMEM((cached, rows, 1), jnp.float32),
                pltpu.VMEM((cached, rows, 1), jnp.float32),
                pltpu.VMEM((cached, rows, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=["parallel", "arbitrary"]
        ),
        out_shape=jax.ShapeDtypeStruct((batch, cached, rows, width), q.dtype),
        interpret=interpret,
    )(
        jnp.reshape(layer, 1).astype(jnp.int32),
        jnp.maximum(starts, 0).astype(jnp.int32),
        lengths.astype(jnp.int32),
        queries,
        *stacks,
        *added,
    )
    return out[:, :, : heads // cached].reshape(q.shape)


def _block(positions: int, most: int, window: int | None) -> int:
    """Return positions per block: all, or a multiple of the 128 lanes of the scales.

    A window is cut in half at least, for it rarely begins where a block does.
    """
    if window is not None:
        most = min(most, -(-window // 256) * 128)
    return positions if positions <= most else most // 128 * 128


def _per_row(bias: jax.Array, cached: int, rows: int) -> jax.Array:
    """Return ``[B or 1, H, S]`` with a row for each of the kernel's queries.

    Where a head of the cache serves one of ``q``, its row is that of the padding, too.
    """
    of_head = bias.reshape(bias.shape[0], cached, -1, bias.shape[2])
    missing = 0 if of_head.shape[2] == 1 else rows - of_head.shape[2]
    padded = jnp.pad(of_head, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return padded.reshape(bias.shape[0], -1, bias.shape[2]).astype(jnp.float32)


def _body(
    block: int,
    cap: float | None,
    begins: bool,
    layer: Any,
    starts: Any,
    ends: Any,
    *refs: Any,
) -> None:
    """Take one block of positions into the running softmax of every head."""
    q, keys, values, key_scales, value_scales, *bias, out, largest, total, mixed = refs
    b, j = pl.program_id(0), pl.program_id(1)
    first = (lax.div(starts[b], block) + j) * block

    @pl.when(j == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, MASKED)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(first < ends[b])
    def _() -> None:
        for head in range(keys.shape[0]):
            k = keys[head].astype(jnp.bfloat16)
            scores = lax.dot_general(
                q[head], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            scores = scores * key_scales[head : head + 1]
            if cap is not None:
                scores = jnp.tanh(scores * (1 / cap)) * cap
            for a in bias:
                rows = a.shape[0] // keys.shape[0]
                scores = scores + a[head * rows : (head + 1) * rows]
            place = first + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            counts = place < ends[b]
            if begins:
                counts &= place >= starts[b]
            scores = jnp.where(counts, scores, MASKED)
            new = jnp.maximum(largest[head], jnp.max(scores, 1, keepdims=True))
            kept = jnp.exp(largest[head] - new)
            weight = jnp.exp(scores - new)
            total[head] = total[head] * kept + jnp.sum(weight, 1, keepdims=True)
            largest[head] = new
            scaled = jnp.where(counts, weight * value_scales[head : head + 1], 0.0)
            part = jnp.dot(
                scaled.astype(jnp.bfloat16),
                values[head].astype(jnp.bfloat16),
                preferred_element_type=jnp.float32,
            )
            mixed[head] = mixed[head] * kept + part

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        # a sequence without positions has a total of 0
        out[...] = (mixed[...] / jnp.maximum(total[...], 1e-30)).astype(out.dtype)


def reference(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_scales: jax.Array,
    value_scales: jax.Array,
    lengths: jax.Array,
    layer: jax.Array | None = None,
    *,
    starts: jax.Array | None = None,
    bias: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Return the same in float32 and plain jnp."""
    if layer is not None:
        keys, values = keys[layer], values[layer]
        key_scales, value_scales = key_scales[layer], value_scales[layer]
    repeats = q.shape[1] // keys.shape[1]

    def wide(codes: jax.Array, scales: jax.Array) -> jax.Array:
        numbers = codes.astype(jnp.float32) * scales[..., None]
        return jnp.repeat(numbers, repeats, axis=1)

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum(
        "bhd,bhsd->bhs",
        q.astype(jnp.float32) * scale,
        wide(keys, key_scales),
        precision="highest",
    )
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    place, ends = jnp.arange(keys.shape[2])[None, None], lengths[:, None, None]
    counts = place < ends
    if starts is not None:
        counts &= place >= starts[:, None, None]
    if window is not None:
        counts &= place >= ends - window
    scores = jnp.where(counts, scores, MASKED)
    weights = jnp.where(counts, jax.nn.softmax(scores, -1), 0.0)
    return jnp.einsum(
        "bhs,bhsd->bhd", weights, wide(values, value_scales), precision="highest"
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache and a token for tests and benchmarks.

    Attributes:
        name: what is special about it.
        batch: sequences.
        heads: of the query.
        cached: heads of the cache.
        positions: that the cache has room for.
        width: of a head.
        dtype: of the cache.
        layers: stacked caches, or None.
        window: positions before the end that count, or None.
        cap: of the scores, or None.
        biased: whether something is added to the scores, and positions are left out
            that the window would have.
    """

    name: str
    batch: int
    heads: int
    cached: int
    positions: int
    width: int
    dtype: str = "int8"
    layers: int | None = None
    window: int | None = None
    cap: float | None = None
    biased: bool = False

    def options(self, seed: int = 0) -> dict[str, Any]:
        """Return keyword arguments for the same seed's `arrays`."""
        told = {"window": self.window, "cap": self.cap}
        if not self.biased:
            return told
        random = np.random.default_rng(seed + 1)
        bias = random.standard_normal((self.batch, self.heads, self.positions))
        starts = np.asarray(self.arrays(seed)[5]) // 3
        return told | {"bias": jnp.asarray(bias, jnp.float32), "starts": starts}

    def arrays(self, seed: int = 0) -> list[Any]:
        """Return random arguments; the first sequence is empty, the last one full."""
        random = np.random.default_rng(seed)
        lead = () if self.layers is None else (self.layers,)
        scales = (*lead, self.batch, self.cached, self.positions)
        q = random.standard_normal((self.batch, self.heads, self.width))
        most = int(jnp.iinfo(self.dtype).max)
        ends = random.integers(1, self.positions, self.batch)
        ends[0], ends[-1] = 0, self.positions
        sizes = [random.uniform(1, 4, scales) / most for _ in range(2)]
        return [
            jnp.asarray(q, jnp.bfloat16),
            elements(random, (*scales, self.width), self.dtype),
            elements(random, (*scales, self.width), self.dtype),
            *(jnp.asarray(size, jnp.float32) for size in sizes),
            jnp.asarray(ends, jnp.int32),
            None if self.layers is None else jnp.int32(self.layers - 1),
        ]


CASES = (
    Case("int8, grouped, odd", 3, 6, 2, 700, 128),
    Case("int4, stacked", 2, 4, 4, 256, 64, "int4", layers=2),
    Case("int8, one head each", 2, 2, 2, 512, 128),
    Case("int8, window", 3, 4, 2, 1500, 64, window=300),
    Case("int4, capped window within a block", 4, 2, 1, 900, 256, "int4", None, 1, 5.0),
    Case("int8, biased, one head each", 3, 2, 2, 600, 64, biased=True),
    Case("int8, biased groups", 2, 4, 2, 300, 64, cap=3.0, biased=True),
)
