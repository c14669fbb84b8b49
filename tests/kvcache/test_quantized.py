"""The cache of codes: what is stored, where, in how many bytes; what attends to it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.kvcache import CACHES, cache_bytes, empty_cache
from jaxq.kvcache.attention import KERNELS, Problem, attend, choose
from jaxq.kvcache.quantized import round_heads
from pallas_kernels.target import Target
from pallas_kernels.xla.cached_attention import numbers

CPU = Target("cpu")
KINDS = [name for name, spec in CACHES.items() if spec is not None]
CHIPS = {
    "tpu": Target("tpu", "v5e", interpret=True),
    "gpu": Target("gpu", "sm_90", interpret=True),
    "cpu": CPU,
}


def config(heads=2, width=64, layers=1):
    return types.SimpleNamespace(num_layers=layers, num_kv_heads=heads, head_dim=width)


def normal(shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def read(layer, width):
    """What a layer's codes stand for, `[B, slots, heads, width]`."""
    pairs = (layer.keys, layer.key_scales), (layer.values, layer.value_scales)
    return [
        np.moveaxis(numbers(codes, width, jnp.float32) * scales[..., None], 1, 2)
        for codes, scales in pairs
    ]


@pytest.mark.parametrize("target", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_reads_back_within_half_a_step(kind, target):
    cache = empty_cache(config(), 2, 64, jnp.float32, kind, target)
    keys, values = normal((2, 5, 2, 64)), normal((2, 5, 2, 64), 1)
    cache, at = cache.append(jnp.broadcast_to(jnp.arange(5), (2, 5)))
    layer = jax.jit(lambda c, *a: c.layers[0].write(*a))(cache, keys, values, at)
    codes = 127 if kind == "int8" else 7.5  # one end of the signed grid is -8
    for got, want in zip(read(layer, 64), (keys, values), strict=True):
        largest = np.abs(want).max(-1, keepdims=True)
        # on a signed grid the other end may be clipped by a whole step
        step = largest / codes * (0.5 if kind == "int8" else 1.1)
        assert np.all(np.abs(got[:, :5] - want) <= step)
        assert np.all(got[:, 5:] == 0)
        assert np.abs(got[:, :5] - want).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_takes_no_slot_and_rows_fill_their_own(kind):
    cache = empty_cache(config(), 2, 64, jnp.float32, kind)
    first = jnp.asarray([[0, 1, 2, -1], [-1, 0, -1, -1]])
    second = jnp.asarray([[3], [1]])
    rows = normal((2, 5, 2, 64))
    done = 0
    for positions in (first, second):
        count = positions.shape[1]
        cache, at = cache.append(positions)
        new = rows[:, done : done + count]
        layer = cache.layers[0].write(new, new, at)
        cache = dataclasses.replace(cache, layers=(layer,))
        done += count
    assert cache.lengths.tolist() == [4, 2]
    assert cache.positions[:, :5].tolist() == [[0, 1, 2, 3, -1], [0, 1, -1, -1, -1]]
    want = np.zeros((2, 4, 2, 64), np.float32)
    want[0], want[1, :2] = (
        rows[0, jnp.asarray([0, 1, 2, 4])],
        rows[1, jnp.asarray([1, 4])],
    )
    codes, scales = round_heads(jnp.asarray(want), CACHES[kind], layer.keys.dtype)
    again = numbers(codes, 64, jnp.float32) * scales[..., None]
    np.testing.assert_array_equal(read(layer, 64)[0][:, :4], again)


def test_tokens_behind_the_last_slot_are_dropped():
    cache = empty_cache(config(), 1, 64, jnp.float32, "int8")
    positions = jnp.arange(70)[None]
    cache, at = cache.append(positions)
    new = normal((1, 70, 2, 64))
    layer = cache.layers[0].write(new, new, at)
    assert cache.lengths.tolist() == [64]
    assert cache.positions[0, -1] == 63
    np.testing.assert_allclose(read(layer, 64)[0][0, 63], new[0, 63], atol=0.02)


def test_bytes_are_those_of_codes_and_scales():
    shape = config(heads=3, width=128, layers=2)
    tokens = 2 * 2 * 3 * 256 * 4  # keys and values, layers, heads, slots, rows
    for kind, bits in (("float", 16), ("int8", 8 + 32 / 128), ("int4", 4 + 32 / 128)):
        for target in CHIPS.values():
            cache = jax.eval_shape(
                lambda k=kind, t=target: empty_cache(shape, 4, 256, jnp.bfloat16, k, t)
            )
            assert cache_bytes(cache) == tokens * 128 * bits / 8


def held(kind, target, lengths=(130, 7), heads=2, width=64):
    """A cache with some tokens, and the queries that come last."""
    cache = empty_cache(config(heads, width), 2, 192, jnp.float32, kind, target)
    most = max(lengths)
    positions = jnp.arange(most)[None]
    positions = jnp.where(positions < jnp.asarray(lengths)[:, None], positions, -1)
    cache, at = cache.append(positions)
    keys = normal((2, most, heads, width)), normal((2, most, heads, width), 1)
    layer = cache.layers[0].write(*keys, at)
    return layer, cache.positions, jnp.asarray(lengths)[:, None] - 1


BIAS = normal((1, 4, 1, 192), 3)


@pytest.mark.parametrize("chip", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int8", {}),
        ("int4", {"scale": 0.2}),
        ("int8", {"window": 50, "cap": 2.0}),
        ("int4", {"window": 100, "bias": BIAS}),
    ],
    ids=["plain", "scale", "window, cap", "window, bias"],
)
def test_the_kernels_of_chips_agree_with_plain_xla(kind, chip, options):
    q = normal((2, 1, 4, 64), 2)
    outs = []
    for target in (CHIPS[chip], CPU):
        layer, key_positions, last = held(kind, target)
        p = Problem(q, layer, last, key_positions, **options)
        kernel, choice = choose(p, target)
        expected = (
            f"{chip}.decode_attention" if target != CPU else "xla.cached_attention"
        )
        assert kernel.name == choice.kernel == expected
        outs.append(np.asarray(attend(p)[0]))
    # queries and probabilities are bfloat16 in the kernels, float32 here
    assert np.abs(outs[0] - outs[1]).max() <= 2.0**-6 * np.abs(outs[1]).max()
    assert np.abs(outs[1]).max() > 0.1


@pytest.mark.parametrize("chip", ["tpu", "gpu"])
def test_a_window_is_of_positions_and_padding_sees_nothing(chip):
    """Tokens stand at 0, 3, 6, ...: 16 of them are less than 48 back."""
    q = normal((2, 1, 4, 64), 2)
    outs = []
    for target in (CHIPS[chip], CPU):
        layer, key_positions, last = held("int8", target)
        key_positions = jnp.where(key_positions < 0, -1, 3 * key_positions)
        queries = jnp.asarray([[3 * int(last[0, 0])], [-1]])
        p = Problem(q, layer, queries, key_positions, window=48)
        assert choose(p, target)[0].name.startswith(
            target.backend.replace("cpu", "xla")
        )
        outs.append(np.asarray(attend(p)[0]))
    assert [a.tolist() for a in p.span] == [[114, 0], [130, 0]]
    assert np.abs(outs[0] - outs[1]).max() <= 2.0**-6 * np.abs(outs[1]).max()
    assert np.all(outs[0][1] == 0)
    assert np.abs(outs[1][0]).max() > 0.1


@pytest.mark.parametrize("chip", ["tpu", "gpu"])
def test_what_a_kernel_does_not_know_runs_in_xla_and_is_told(chip):
    layer, key_positions, last = held("int8", CHIPS[chip])
    p = Problem(normal((2, 3, 4, 64)), layer, last, key_positions)
    kernel, choice = choose(p, CHIPS[chip])
    assert kernel.name == "xla.cached_attention"
    ((name, why),) = choice.declined
    assert name == f"{chip}.decode_attention"
    assert "3 tokens at once" in why


@pytest.mark.parametrize(
    ("target", "kind", "width", "reason"),
    [
        (Target("gpu", "sm_75"), "int8", 64, "not for sm_75"),
        (Target("tpu", ""), "int8", 64, "not for this kind of tpu"),
        (Target("gpu", "sm_90"), "int8", 80, "80 bytes per head"),
        (Target("gpu", "sm_90"), "int4", 16, "8 bytes per head"),
    ],
)
def test_chips_and_shapes_without_a_kernel_are_told(target, kind, width, reason):
    layer, key_positions, last = held(kind, target, width=width)
    p = Problem(normal((2, 1, 4, width)), layer, last, key_positions)
    kernel, choice = choose(p, target)
    assert kernel.name == "xla.cached_attention"
    assert reason in choice.declined[0][1]


def test_a_cache_made_for_another_chip_is_told():
    layer, key_positions, last = held("int4", CHIPS["tpu"])
    p = Problem(normal((2, 1, 4, 64)), layer, last, key_positions)
    assert "make the cache for a gpu" in choose(p, CHIPS["gpu"])[1].declined[0][1]
    layer, *_ = held("int4", CHIPS["gpu"])
    p = dataclasses.replace(p, layer=layer)
    assert "make the cache for a tpu" in choose(p, CHIPS["tpu"])[1].declined[0][1]


def test_under_a_mesh_the_compiler_splits_what_xla_runs():
    layer, key_positions, last = held("int8", CHIPS["tpu"])
    p = Problem(normal((2, 1, 4, 64)), layer, last, key_positions)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        reason = choose(p, CHIPS["tpu"])[1].declined[0][1]
    assert "not on {'x': 2}: use jax.shard_map" in reason
    placed = jax.device_put(p.q, jax.NamedSharding(mesh, jax.P("x")))
    known = dataclasses.replace(p, q=placed)  # by its type alone, as behind a weight
    assert choose(known, CHIPS["tpu"])[1].declined[0][1] == reason
    assert choose(p, CHIPS["tpu"])[0].name == "tpu.decode_attention"


def test_the_last_kernel_runs_everywhere():
    assert set(KERNELS[-1].backends) == {"cpu", "gpu", "tpu"}


def test_caches_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"'int3'.*Known: float, int4, int8"):
        empty_cache(config(), 1, 64, jnp.float32, "int3")
    with pytest.raises(ValueError, match=r"head_dim is 5.*float or int8"):
        empty_cache(config(width=5), 1, 64, jnp.float32, "int4")
