"""Attention of one token per sequence over an int8 or int4 cache (Pallas-Triton).

    o = Σ_s p_s v_s,   p = softmax_s(q · k_s / √D),   k_s = κ_s · code,  v_s alike

A token's scale leaves the products: κ multiplies the score, ν the probability, so codes
go to the tensor cores as exact 16-bit numbers. What counts of a sequence, all of it or
a window, is cut into a part for each of its thread blocks, with a maximum and a sum of
its own, and the parts are put together by XLA; no other tokens are read.

An int4 code of channel d shares its byte with channel d + D / 2 (low half first); codes
are ``value + 8``. int8 codes are two's complement.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.gpu.triton_grid import LEAST, by_rows
from pallas_kernels.gpu.unpack import CacheFloats
from pallas_kernels.gpu.words import Arrays, assemble

LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the context is cut.

    Attributes:
        tokens: per step, 16 · 2^n.
        parts: of what counts of a sequence, for different thread blocks.
        warps: per thread block.
        stages: of Triton's pipeline.
    """

    tokens: int = 64
    parts: int = 8
    warps: int = 4
    stages: int = 3


TILES = (Tile(), Tile(128, 8), Tile(64, 16), Tile(64, 32), Tile(32, 16, 4, 4))


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache for tests and benchmarks.

    Attributes:
        name: what is special about it.
        batch: sequences.
        heads: of keys and values.
        queries: per head of keys and values.
        tokens: the longest context.
        channels: per head.
        bits: 8 or 4.
        dtype: of queries.
        window: tokens before the end that count, or None.
        cap: of the scores, or None.
        biased: whether something is added to the scores.
    """

    name: str
    batch: int
    heads: int
    queries: int
    tokens: int
    channels: int
    bits: int
    dtype: str = "bfloat16"
    window: int | None = None
    cap: float | None = None
    biased: bool = False

    def options(self, seed: int = 0) -> dict[str, Any]:
        """Return keyword arguments for the same seed's `arrays`."""
        told: dict[str, Any] = {"bits": self.bits, "cap": self.cap}
        if self.window is not None:
            ends = self.arrays(seed)[5]
            told["starts"] = jnp.maximum(ends - self.window, 0)
        if self.biased:
            size = self.batch, self.heads * self.queries, self.tokens
            bias = np.random.default_rng(seed + 1).standard_normal(size)
            told["bias"] = jnp.asarray(bias.astype(np.float32))
        return told

    def arrays(self, seed: int = 0) -> list[jax.Array]:
        """Return random arguments of `decode_attention`."""
        random = np.random.default_rng(seed)
        lead = self.batch, self.heads
        q = random.standard_normal((*lead, self.queries, self.channels))
        size = (*lead, self.tokens, self.channels * self.bits // 8)
        codes = [random.integers(0, 256, size, dtype=np.uint8) for _ in range(2)]
        scales = [random.uniform(0.01, 0.02, size[:-1]) for _ in range(2)]
        lengths = random.integers(1, self.tokens + 1, self.batch)
        lengths[0] = self.tokens
        return [
            jnp.asarray(q.astype(self.dtype)),
            *map(jnp.asarray, codes),
            *(jnp.asarray(scale.astype(np.float32)) for scale in scales),
            jnp.asarray(lengths.astype(np.int32)),
        ]


CASES = (
    Case("int8", 2, 2, 4, 256, 64, 8),
    Case("int4", 2, 1, 8, 128, 128, 4),
    Case("int8, one query, odd length, float32", 1, 2, 1, 200, 64, 8, "float32"),
    Case("int8, window, caps", 3, 2, 2, 400, 64, 8, window=70, cap=5.0),
    Case("int4, biased, window", 2, 2, 1, 192, 64, 4, window=150, biased=True),
    Case("int8, biased groups", 1, 2, 3, 128, 32, 8, biased=True),
)


def decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_scales: jax.Array,
    value_scales: jax.Array,
    lengths: jax.Array,
    *,
    bits: int,
    starts: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
    tile: Tile = TILES[0],
    interpret: bool = False,
) -> jax.Array:
    """Return the attention of one token per sequence.

    Args:
        q: ``[B, H, G, D]``: G queries share a head of keys and values.
        keys: uint8 ``[B, H, S, D · bits / 8]``.
        values: like ``keys``.
        key_scales: float32 ``[B, H, S]``.
        value_scales: like ``key_scales``.
        lengths: int32 ``[B]``, the tokens of each cache; 0 gives zeros.
        bits: 8 or 4.
        starts: int32 ``[B]``, the first token that counts; by default 0.
        bias: float32 ``[B or 1, H · G, S]``, added to the scores.
        scale: of the scores; ``D ** -0.5`` by default.
        cap: scores s become ``cap tanh(s / cap)``.
        tile: how to cut; fewer parts where the cache is small.
        interpret: whether to run on a CPU.

    Returns:
        ``[B, H, G, D]`` in the dtype of ``q``.

    Raises:
        ValueError: when ``bits`` is neither 8 nor 4.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: a cache has codes of 4 or 8 bits")
    batch, heads, queries, channels = q.shape
    rows = max(LEAST, 1 << (queries - 1).bit_length())
    added = [] if bias is None else [_per_row(bias, heads, rows)]
    cached = _whole_steps([keys, values, key_scales, value_scales], tile.tokens, axis=2)
    added = _whole_steps(added, tile.tokens, axis=3)
    slots = cached[0].shape[2]
    parts = min(tile.parts, slots // tile.tokens)
    starts = jnp.zeros_like(lengths) if starts is None else starts
    half = jnp.float16 if q.dtype == jnp.float16 else jnp.bfloat16
    factor = channels**-0.5 if scale is None else scale
    scaled = (q.astype(jnp.float32) * factor).astype(half)
    scaled = jnp.pad(scaled, ((0, 0), (0, 0), (0, rows - queries), (0, 0)))
    cache = pl.BlockSpec(
        (None, None, slots, channels * bits // 8), lambda b, h, j: (b, h, 0, 0)
    )
    of_token = pl.BlockSpec((None, None, slots), lambda b, h, j: (b, h, 0))
    shared = bias is not None and bias.shape[0] == 1
    of_bias = [
        pl.BlockSpec(
            (None, None, a.shape[2], slots),
            lambda b, h, j: (0 if shared else b, h, 0, 0),
        )
        for a in added
    ]
    of_row = pl.BlockSpec((1,), lambda b, h, j: (b,))
    out, weight = pl.pallas_call(
        functools.partial(_kernel, bits, tile.tokens, parts, cap, interpret),
        grid=(batch, heads, parts),
        in_specs=[
            *[of_row, of_row],
            pl.BlockSpec((None, None, rows, channels), lambda b, h, j: (b, h, 0, 0)),
            *[cache, cache, of_token, of_token, *of_bias],
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, rows, channels), lambda b, h, j: (b, h, j, 0, 0)
            ),
            pl.BlockSpec((None, None, None, rows), lambda b, h, j: (b, h, j, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, parts, rows, channels), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, parts, rows), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        interpret=interpret,
    )(starts, lengths, scaled, *cached, *added)
    share = jax.nn.softmax(weight, axis=2)[..., None]
    return jnp.sum(out * share, axis=2)[:, :, :queries].astype(q.dtype)


def _whole_steps(arrays: list[jax.Array], tokens: int, axis: int) -> list[jax.Array]:
    """Return arrays with whole steps of tokens along an axis; caches have them."""

    def padded(a: jax.Array) -> jax.Array:
        missing = -a.shape[axis] % tokens
        pad = [(0, missing if i == axis else 0) for i in range(a.ndim)]
        return jnp.pad(a, pad) if missing else a

    return [padded(a) for a in arrays]


def _per_row(bias: jax.Array, heads: int, rows: int) -> jax.Array:
    """Return ``[B or 1, H · G, S]`` as ``[B or 1, H, rows, S]``.

    A single query's row is that of the padding, too, and stays one: ``[B, H, 1, S]``.
    """
    of_head = bias.reshape(bias.shape[0], heads, -1, bias.shape[2])
    missing = 0 if of_head.shape[2] == 1 else rows - of_head.shape[2]
    pad = ((0, 0), (0, 0), (0, missing), (0, 0))
    return jnp.pad(of_head, pad).astype(jnp.float32)


def _kernel(
    bits: int,
    tokens: int,
    parts: int,
    cap: float | None,
    interpret: bool,
    starts: Any,
    ends: Any,
    q: Any,
    keys: Any,
    values: Any,
    key_scales: Any,
    value_scales: Any,
    *rest: Any,
) -> None:
    """Attend to one part of a context; write its mean and the log of its weight."""
    *bias, out, weight = rest
    start, end = starts[0], ends[0]
    begin, steps = _part(start, end, tokens, parts)
    query, rows = q[...], q.shape[0]
    fields = 8 // bits
    width = q.shape[1] // fields
    queries = (
        [query] if fields == 1 else [q[:, pl.ds(i * width, width)] for i in (0, 1)]
    )

    def step(i: Any, carry: Any) -> Any:
        top, total, sums = carry
        first = (begin + i) * tokens
        here = pl.ds(first, tokens)
        k = _numbers(keys[here], bits, query.dtype, interpret)
        pairs = zip(queries, k, strict=True)
        score = sum(by_rows(a, b, jnp.float32) for a, b in pairs)
        score = score * key_scales[here][None]
        if cap is not None:
            score = jnp.tanh(score * jnp.float32(1 / cap)) * jnp.float32(cap)
        for a in bias:
            score = score + a[:, here]
        place = first + lax.broadcasted_iota(jnp.int32, score.shape, 1)
        score = jnp.where((place >= start) & (place < end), score, jnp.float32(LOWEST))
        new = jnp.maximum(top, jnp.max(score, axis=1))
        fade, p = jnp.exp(top - new), jnp.exp(score - new[:, None])
        mass = (p * value_scales[here][None]).astype(query.dtype)
        v = _numbers(values[here], bits, query.dtype, interpret)
        added = [jnp.dot(mass, b, preferred_element_type=jnp.float32) for b in v]
        sums = [a * fade[:, None] + b for a, b in zip(sums, added, strict=True)]
        return new, total * fade + jnp.sum(p, axis=1), sums

    zero = [jnp.zeros((rows, width), jnp.float32) for _ in range(fields)]
    nothing = (
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        zero,
    )
    top, total, sums = lax.fori_loop(0, steps, step, nothing)
    total = jnp.maximum(total, jnp.float32(1e-30))
    for i, part in enumerate(sums):
        out[:, pl.ds(i * width, width)] = part / total[:, None]
    weight[...] = top + jnp.log(total)


def _part(start: Any, end: Any, tokens: int, parts: int) -> tuple[Any, Any]:
    """Return the first step of this thread block, and how many it takes."""
    first, last = lax.div(start, tokens), lax.div(end + (tokens - 1), tokens)
    each = lax.div(last - first + (parts - 1), parts)
    begin = first + pl.program_id(2) * each
    return begin, jnp.clip(last - begin, 0, each)


def _numbers(
    codes: jax.Array, bits: int, dtype: Any, interpret: bool
) -> list[jax.Array]:
    """Return bytes ``[tokens, c]`` as exact numbers, an array per field."""
    floats = CacheFloats(bits, jnp.dtype(dtype).name)
    return [
        _field(functools.partial(floats.program, field=field), codes, dtype, interpret)
        for field in range(8 // bits)
    ]


def _field(program: Any, codes: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """Run a program that makes two words of 16-bit floats of four bytes."""
    if interpret:
        fours = codes.reshape(codes.shape[0], -1, 4)
        words = [lax.bitcast_convert_type(fours, jnp.uint32)]
        found = jnp.stack(program(Arrays(), words), axis=-1)
        halves = lax.bitcast_convert_type(found, jnp.uint16)
        return lax.bitcast_convert_type(halves, dtype).reshape(codes.shape)
    assembly = assemble(program, 1, 2)
    (result,) = triton.elementwise_inline_asm(
        assembly.text,
        args=[codes],
        constraints=assembly.constraints,
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, dtype)],
    )
    return result


def reference(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_scales: jax.Array,
    value_scales: jax.Array,
    lengths: jax.Array,
    *,
    bits: int,
    starts: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Return the same in float32 and plain jnp."""

    def numbers(codes: jax.Array, scales: jax.Array) -> jax.Array:
        if bits == 8:
            value = lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
        else:
            both = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
            value = both.astype(jnp.float32) - 8
        return value * scales[..., None]

    k, v = numbers(keys, key_scales), numbers(values, value_scales)
    score = jnp.einsum("bhgd,bhsd->bhgs", q.astype(jnp.float32), k)
    score = score * (math.sqrt(1 / q.shape[-1]) if scale is None else scale)
    if cap is not None:
        score = cap * jnp.tanh(score / cap)
    if bias is not None:
        score = score + bias.reshape(bias.shape[0], *score.shape[1:])
    place = jnp.arange(k.shape[2])
    inside = place < lengths[:, None, None, None]
    if starts is not None:
        inside &= place >= starts[:, None, None, None]
    share = jax.nn.softmax(jnp.where(inside, score, -jnp.inf), axis=-1)
    return jnp.einsum("bhgs,bhsd->bhgd", share, v)
