"""The Llama family against transformers' logits, and the parts against plain NumPy."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxq.huggingface import load_huggingface
from jaxq.kvcache import PADDING, empty_cache
from jaxq.models import Llama, LlamaConfig
from jaxq.models.attention import attend, visible
from jaxq.models.rope import Rope, rotate

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
# Both sides compute in float32 and sum in different orders; logits are of order 1 and
# pass through some thirty sums of about 50 terms: 30 * 50 * 2**-24 is 1e-4.
TOLERANCE = 1e-4


def golden(name):
    model = load_huggingface(GOLDEN / name, jnp.float32)
    stored = load_file(GOLDEN / name / "golden.safetensors")
    return model, jnp.asarray(stored["tokens"]), stored["logits"]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    model, tokens, expected = golden(name)
    logits = jax.jit(model.module.apply)(model.params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama2", "mistral", "llama_biased"])
def test_bfloat16_stays_near_float32(name):
    model = load_huggingface(GOLDEN / name)
    _, tokens, expected = golden(name)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.module.apply)(model.params, tokens)
    assert logits.dtype == jnp.float32
    # Eight bits of mantissa through two layers: about 2**-8 for each of ten roundings.
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < 10 * 2**-8


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_stored_logits_are_what_transformers_computes(name):
    from tests.models.make_golden import logits_of

    stored = load_file(GOLDEN / name / "golden.safetensors")
    np.testing.assert_allclose(
        logits_of(GOLDEN / name, stored["tokens"]), stored["logits"], rtol=0, atol=1e-5
    )


def test_golden_models_stay_small():
    sizes = {n: sum(f.stat().st_size for f in (GOLDEN / n).iterdir()) for n in CASES}
    assert max(sizes.values()) < 100_000, sizes


def test_attention_is_a_softmax_over_what_is_visible(rng):
    batch, length, heads, kv_heads, width = 2, 7, 6, 2, 4
    q = rng.normal(size=(batch, length, heads, width))
    k = rng.normal(size=(batch, length, kv_heads, width))
    v = rng.normal(size=(batch, length, kv_heads, width))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    mask = visible(positions, positions, 3)
    got = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = range(max(0, t - 2), t + 1)
        shared = h // (heads // kv_heads)
        scores = np.array([q[b, t, h] @ k[b, s, shared] for s in seen]) / width**0.5
        weights = np.exp(scores) / np.exp(scores).sum()
        values = np.array([v[b, s, shared] for s in seen])
        expected[b, t, h] = weights @ values
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_rotation_depends_on_the_distance_alone(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(query_at, key_at):
        place = lambda at: jnp.full((1, 1), at, jnp.int32)
        turned = rotate(q, place(query_at), Rope()), rotate(k, place(key_at), Rope())
        return float(jnp.vdot(*turned))

    # Angles of some tens of radians in float32: an error of about 1e-5.
    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@pytest.fixture(scope="module")
def small():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        windows=(None, 6),
        init_scale=0.3,
    )
    module = Llama(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return config, jax.jit(module.apply), params


@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 1, 5, 1)])
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(small, chunks):
    config, apply, params = small
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
    whole = apply(params, tokens)
    cache = empty_cache(config, 2, 16, jnp.float32)
    pieces, done = [], 0
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(done, done + size), (2, size))
        piece = tokens[:, done : done + size]
        logits, cache = apply(params, piece, positions, cache)
        pieces.append(logits)
        done += size
    assert int(cache.end) == 12
    rest, _ = apply(params, tokens[:, :1], None, cache)
    beyond = apply(params, jnp.concatenate([tokens, tokens[:, :1]], 1))[:, -1:]
    np.testing.assert_allclose(rest, beyond, rtol=0, atol=1e-5)
    # The same float32 sums, over sixteen slots in place of twelve.
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_any_side_changes_nothing(small, side):
    _, apply, params = small
    tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 40)
    before, after = {"left": (4, 0), "right": (0, 4), "both": (2, 3)}[side]
    pads = ((0, 0), (before, after))
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    padded = apply(
        params,
        jnp.pad(tokens, pads, constant_values=7),
        jnp.pad(positions, pads, constant_values=PADDING),
    )
    alone = apply(params, tokens)
    kept = padded[:, before : before + 9]
    np.testing.assert_allclose(kept, alone, rtol=0, atol=1e-5)
    assert np.isfinite(padded).all()
