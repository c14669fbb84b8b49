"""Attention over codes in plain XLA, against float64 over what the codes stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.xla import cached_attention

BATCH, WIDTH = 3, 16
LENGTHS = (1, 37, 70)  # of 70 slots


def arrays(bits, tokens, heads, cached, seed=0):
    """Codes as stored, the numbers they stand for, and where everything stands."""
    random = np.random.default_rng(seed)
    shape = (BATCH, cached, 70)
    low = -(2 ** (bits - 1))
    codes = random.integers(low, -low, (2, *shape, WIDTH))
    scales = random.uniform(-0.02, 0.02, (2, *shape)) * 2 ** (8 - bits)
    held = codes * scales[..., None]
    stored = codes.astype(np.int8)
    if bits == 4:
        half = (codes + 8).astype(np.uint8)
        stored = half[..., : WIDTH // 2] | half[..., WIDTH // 2 :] << 4
    lengths = np.array(LENGTHS)
    slots = np.arange(70)[None]
    key_positions = np.where(slots < lengths[:, None], slots, -1)
    positions = lengths[:, None] - tokens + np.arange(tokens)
    q = random.standard_normal((BATCH, tokens, heads, WIDTH))
    return q, stored, scales, held, positions, key_positions, lengths


def exact(q, held, positions, key_positions, *, window, scale, cap, bias):
    """The definition, in float64, one query at a time."""
    keys, values = held
    out = np.zeros(q.shape)
    share = q.shape[2] // keys.shape[1]
    for b, t, h in np.ndindex(*q.shape[:3]):
        here = positions[b, t]
        seen = (key_positions[b] >= 0) & (key_positions[b] <= here)
        seen &= window is None or here - key_positions[b] < window
        if not seen.any():
            continue
        scores = keys[b, h // share] @ q[b, t, h] * (scale or WIDTH**-0.5)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        scores = scores if bias is None else scores + bias[b, h, 0]
        weights = np.where(seen, np.exp(scores - scores[seen].max()), 0)
        out[b, t, h] = weights @ values[b, h // share] / weights.sum()
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("tokens", "heads", "cached", "options"),
    [
        (1, 4, 2, {}),
        (5, 2, 2, {"window": 7, "scale": 0.3}),
        (3, 4, 1, {"cap": 0.5}),
        (2, 4, 4, {"bias": True}),
    ],
)
def test_it_is_attention_over_what_the_codes_stand_for(
    bits, tokens, heads, cached, options
):
    q, stored, scales, held, positions, key_positions, lengths = arrays(
        bits, tokens, heads, cached
    )
    options = {"window": None, "scale": None, "cap": None, "bias": None} | options
    if options["bias"]:
        options["bias"] = np.random.default_rng(1).normal(size=(BATCH, heads, 1, 70))
    want = exact(q, held, positions, key_positions, **options)
    bias = options["bias"]
    options["bias"] = None if bias is None else jnp.asarray(bias, jnp.float32)
    # blocks of 32: the last one overlaps the one before
    run = jax.jit(functools.partial(cached_attention, block=32, **options))
    got = run(
        jnp.asarray(q, jnp.float32),
        *map(jnp.asarray, stored),
        *jnp.asarray(scales, jnp.float32),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(key_positions, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_a_long_cache_is_never_copied_as_floats():
    cached, slots, width = 2, 8192, 64
    codes = jax.ShapeDtypeStruct((1, cached, slots, width), jnp.int8)
    scales = jax.ShapeDtypeStruct((1, cached, slots), jnp.float32)
    places = jax.ShapeDtypeStruct((1, slots), jnp.int32)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    q = jax.ShapeDtypeStruct((1, 1, 4, width), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = (q, codes, codes, scales, scales, one, places, lengths)
    used = jax.jit(cached_attention).lower(*shapes).compile().memory_analysis()
    floats = 2 * 4 * cached * slots * width
    assert used.temp_size_in_bytes < floats / 10
