"""Convolutions are calibrated as the matrix products of their patches that they are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxq
from jaxq.method import awq, chain, gptq, rtn, smoothquant
from jaxq.ops import Patches
from jaxq.pipeline import quantize_with_evidence
from jaxq.pipeline.rows import Layout
from jaxq.pipeline.statistics import empty, updated
from jaxq.recipe import Recipe, Rule
from jaxq.solvers import Statistics, solve_with
from jaxq.spec import QuantSpec

SPEC = QuantSpec("uint2", 4, symmetric=False)
NHWC = ("NHWC", "HWIO", "NHWC")


def recipe(method, spec=SPEC, **more):
    return Recipe("mine", (Rule("*", spec, solver=method, **more),))


def kernel(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)


def images(count=3, shape=(4, 6, 5, 4), seed=1, channel=-1):
    """Batches whose channels and neighbours are correlated, and of different size."""
    rng = np.random.default_rng(seed)
    width = shape[channel]
    mix = rng.normal(size=(width, width)) * np.exp(rng.normal(size=width))
    out = []
    for _ in range(count):
        x = np.moveaxis(rng.normal(size=shape), channel, -1) @ mix
        x = np.moveaxis(x, -1, channel)
        for axis in range(1, x.ndim):
            x = x + 0.7 * np.roll(x, 1, axis) if axis != channel % x.ndim else x
        out.append((jnp.asarray(x, jnp.float32),))
    return out


def conv(x, w, strides=(1, 1), padding="SAME", numbers=NHWC, **more):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, **more
    )


def patches_of(run, x, w):
    """The rows ``[n, K]`` of a convolution with one group, by its own derivative.

    An output is linear in the kernel, and its slopes are the patch: no window is cut.
    """
    slopes = jax.jacobian(lambda w: jnp.sum(run(x, w[..., :1]), -1))(w[..., :1])
    return np.asarray(slopes, np.float64).reshape(-1, w[..., 0].size)


@functools.cache
def by_hand_solver(spec):
    def solve(w, gram, tokens):
        how = {"spec": spec, "solver": "gptq", "options": ()}
        statistics = Statistics(gram, tokens)
        q = solve_with(w, statistics, contracting=(0,), stacked=(), **how).weight
        return q.dequantize()

    return jax.jit(solve)


def by_hand(w, rows, spec=SPEC):
    """GPTQ of the kernel as a matrix, on the explicit matrix of patches."""
    matrix = w.reshape(-1, w.shape[-1])
    gram = jnp.asarray(rows.T @ rows, jnp.float32)
    found = by_hand_solver(spec)(matrix, gram, jnp.int32(len(rows)))
    return np.asarray(found).reshape(w.shape)


def network(params, x):
    x = jax.nn.relu(conv(x, params["a"]))
    return conv(x, params["b"], (2, 1), [(1, 0), (0, 2)])


def test_gptq_of_a_kernel_is_gptq_of_its_matrix_on_the_patches():
    params = {"a": kernel(3, 3, 4, 4), "b": kernel(3, 3, 4, 4, seed=3)}
    found = quantize_with_evidence(params, recipe(gptq()), network, images())
    want = params["a"]
    x = jnp.concatenate([x for (x,) in images()])
    rows = patches_of(conv, x, want)
    a = by_hand(want, rows)
    np.testing.assert_allclose(found.params["a"].dequantize(), a, atol=1e-6)
    # the second layer sees what the quantized first one computes
    hidden = jax.nn.relu(conv(x, jnp.asarray(a)))
    run = lambda x, w: conv(x, w, (2, 1), [(1, 0), (0, 2)])
    rows = patches_of(run, hidden, params["b"])
    b = by_hand(params["b"], rows)
    np.testing.assert_allclose(found.params["b"].dequantize(), b, atol=1e-6)

    evidence = found.evidence[1]
    assert evidence.tokens == len(rows)
    assert evidence.fallback is None
    error = rows @ (np.asarray(params["b"], np.float64) - b).reshape(-1, 4)
    np.testing.assert_allclose(evidence.loss, np.mean(error**2), rtol=1e-4)
    near = jaxq.quantize(params["b"], SPEC, axis=(0, 1, 2)).dequantize()
    error = rows @ np.asarray(params["b"] - near, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(evidence.rtn_loss, np.mean(error**2), rtol=1e-4)
    assert evidence.ratio < 0.7


def grouped(params, x):
    return conv(x, params["w"], feature_group_count=2)


def test_every_feature_group_is_a_weight_of_its_own():
    params = {"w": kernel(3, 3, 4, 8)}
    batches = images(shape=(4, 6, 5, 8))
    found = quantize_with_evidence(params, recipe(gptq()), grouped, batches)
    x = jnp.concatenate([x for (x,) in batches])
    parts = [
        by_hand(w, patches_of(conv, part, w))
        for w, part in zip(
            jnp.split(params["w"], 2, -1), jnp.split(x, 2, -1), strict=True
        )
    ]
    got = found.params["w"]
    np.testing.assert_allclose(got.dequantize(), np.concatenate(parts, -1), atol=1e-6)
    plain = jaxq.quantize(params["w"], SPEC, axis=(0, 1, 2))
    alike = jax.tree.map(lambda a, b: a.shape == b.shape, got, plain)
    assert jax.tree.all(alike)
    (row,) = found.evidence
    assert (row.tokens, row.experts, row.fallback) == (x.size // 8, (), None)
    exact, near = grouped(params, x), grouped({"w": plain.dequantize()}, x)
    y = jaxq.quantized(grouped)(found.params, x)
    np.testing.assert_allclose(row.loss, np.mean((y - exact) ** 2), rtol=1e-3)
    np.testing.assert_allclose(row.rtn_loss, np.mean((near - exact) ** 2), rtol=1e-3)


def depthwise(params, x):
    return conv(x, params["w"], feature_group_count=4)


def first_channels(params, x):
    return conv(x, params["w"], numbers=("NCHW", "OIHW", "NCHW"))


def one_dimensional(params, x):
    return conv(x, params["w"], (2,), numbers=("NHC", "HIO", "NHC"), rhs_dilation=(2,))


def transposed(params, x):
    return lax.conv_transpose(
        x, params["w"], (2, 2), "SAME", dimension_numbers=NHWC, transpose_kernel=True
    )


def turned(params, x):
    return conv(x, jnp.transpose(params["w"], (2, 1, 0, 3)))


PLACES = {
    "depthwise": (depthwise, (3, 3, 1, 8), {}),
    "nchw": (first_channels, (6, 4, 3, 3), {"shape": (4, 4, 6, 5), "channel": 1}),
    "1d": (one_dimensional, (5, 4, 6), {"shape": (4, 20, 4)}),
    "transposed": (transposed, (3, 3, 6, 4), {}),
    "turned": (turned, (4, 3, 3, 6), {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_loss_of_the_statistics_is_the_error_of_the_convolution(place):
    """An independent oracle of the Gram matrix: the convolution itself."""
    fn, shape, data = PLACES[place]
    params, batches = {"w": kernel(*shape)}, images(**data)
    method = rtn(clip="importance", steps=20)
    found = quantize_with_evidence(params, recipe(method), fn, batches)
    x = jnp.concatenate([x for (x,) in batches])
    (row,) = found.evidence
    exact = np.asarray(fn(params, x), np.float64)
    error = np.asarray(jaxq.quantized(fn)(found.params, x), np.float64) - exact
    np.testing.assert_allclose(row.loss, np.mean(error**2), rtol=1e-3)
    channels = shape[0] if place == "nchw" else shape[-1]
    channels = shape[2] if place == "transposed" else channels
    assert row.tokens == exact.size // channels
    assert row.ratio < 1
    assert row.fallback is None


def test_all_statistics_of_feature_groups_are_those_of_their_patches(monkeypatch):
    """With the drift between two streams, a mask, and pieces of a line at a time."""
    monkeypatch.setattr(Patches.fold, "__defaults__", (None, 90))
    rng = np.random.default_rng(4)
    x, ahead = jnp.asarray(rng.normal(size=(2, 3, 6, 5, 4)), jnp.float32)
    w = kernel(3, 3, 2, 6)
    run = functools.partial(conv, strides=(2, 1), feature_group_count=2)
    equation = jax.make_jaxpr(run)(x, w).eqns[0]
    layout = Layout((), (), 0, Patches.of(equation.params, w.shape))
    mask = jnp.asarray([[True] * 3, [True, False, True], [False] * 3])
    seen, fine = updated(empty(x, layout, True), x, layout, mask, None, ahead)
    sums = seen.statistics()
    counts = np.repeat(np.asarray(mask).reshape(-1), 5)
    one = functools.partial(conv, strides=(2, 1))
    for group in range(2):
        part = slice(2 * group, 2 * group + 2)
        rows = patches_of(one, x[..., part], w)[counts]
        other = patches_of(one, ahead[..., part], w)[counts]
        for got, want in (
            (sums.gram, rows.T @ rows),
            (sums.magnitude, np.abs(rows).sum(0)),
            (sums.absmax, np.abs(rows).max(0)),
            (seen.low, rows.min(0)),
            (sums.drift, (other - rows).T @ rows),
        ):
            np.testing.assert_allclose(got[group], want, rtol=0, atol=1e-4)
    assert bool(fine)
    assert seen.tokens.tolist() == [counts.sum()] * 2


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(4)(x.mean((1, 2)))


def test_a_flax_model_loses_less_than_rounded_to_nearest():
    batches = images(6, (8, 8, 8, 4))
    *batches, (x,) = batches
    params = Net().init(jax.random.key(0), x)
    exact = Net().apply(params, x)

    def error(method):
        q = jaxq.quantize_params(params, recipe(method), Net().apply, batches)
        y = jaxq.quantized(Net().apply)(q, x)
        return float(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))

    assert error(gptq()) < 0.5 * error("rtn")


def test_a_scale_of_the_channels_is_shared_by_the_window():
    params = {"w": kernel(3, 3, 4, 8)}
    batches = [(x * jnp.asarray([40.0, 1, 1, 1]),) for (x,) in images()]
    fn = lambda p, x: conv(x, p["w"])
    x = batches[0][0]
    exact = fn(params, x)

    def error(method, spec, **more):
        cfg = recipe(method, spec, **more)
        q = quantize_with_evidence(params, cfg, fn, batches)
        assert q.evidence[0].fallback is None
        y = jaxq.quantized(fn)(q.params, x)
        return float(jnp.mean((y - exact) ** 2)), q.params["w"]

    method, spec = chain(awq(points=8), rtn()), QuantSpec("int3")
    protected, q = error(method, spec)
    assert q.input_scale.shape == (1, 1, 4, 1)
    assert protected < 0.6 * error("rtn", spec)[0]
    (row,) = jaxq.plan(fn, params, recipe(method, spec), x)
    assert row.bytes_after == q.nbytes

    int8 = {"activation": QuantSpec("int8", "tensor")}
    smooth, q = error(chain(smoothquant(0.5)), QuantSpec("int8"), **int8)
    assert q.input_scale.shape == (1, 1, 4, 1)
    assert smooth < 0.5 * error("rtn", QuantSpec("int8"), **int8)[0]


def test_what_cannot_be_done_is_rounded_and_says_so():
    batches = images(shape=(4, 6, 5, 8))
    x = batches[0][0]
    params = {"w": kernel(3, 3, 4, 6)}
    for method, spec, why in (
        (chain(awq(), gptq()), SPEC, "'awq' scales channels, and its 2 groups share"),
        (gptq(), QuantSpec("int4", "tensor"), "2 feature groups are weights of their"),
    ):
        cfg = recipe(method, spec)
        found = quantize_with_evidence(params, cfg, grouped, batches)
        (row,) = found.evidence
        assert row.fallback.startswith("rounded to nearest: ")
        assert why in row.fallback
        assert row.tokens == 0
        near = jaxq.quantize(params["w"], spec, axis=(0, 1, 2))
        np.testing.assert_array_equal(found.params["w"].codes, near.codes)
        assert why in jaxq.plan(grouped, params, cfg, x).rows[0].reason

    fused = lambda p, x: conv(x, p["w"].reshape(3, 3, 8, 6))
    params = {"w": kernel(9, 8, 6)}
    (row,) = quantize_with_evidence(params, recipe(gptq()), fused, batches).evidence
    assert "put together from other axes" in row.fallback

    several = lambda p, x: conv(x, p["w"], batch_group_count=2)
    params = {"w": kernel(3, 3, 8, 6)}
    (row,) = quantize_with_evidence(params, recipe(gptq()), several, batches).evidence
    assert "batch groups (2)" in row.fallback


def test_a_kernel_at_two_places_is_calibrated_in_one_shot():
    fn = lambda p, x: conv(jnp.tanh(conv(x, p["w"])), p["w"])
    params, batches = {"w": kernel(3, 3, 4, 4)}, images()
    found = quantize_with_evidence(params, recipe(gptq()), fn, batches)
    x = jnp.concatenate([x for (x,) in batches])
    hidden = jnp.tanh(conv(x, params["w"]))
    rows = [patches_of(conv, x, params["w"]), patches_of(conv, hidden, params["w"])]
    want = by_hand(params["w"], np.concatenate(rows))
    np.testing.assert_allclose(found.params["w"].dequantize(), want, atol=1e-6)
    assert found.evidence[0].tokens == 2 * x.size // 4
    assert "one shot on the float model" in found.evidence[0].note


def test_a_scan_over_convolutions_is_the_layers_one_by_one():
    def scanned(params, x):
        step = lambda x, w: (jax.nn.relu(conv(x, w, feature_group_count=2)), None)
        return lax.scan(step, x, params["w"])[0]

    def unrolled(params, x):
        for w in params["w"]:
            x = jax.nn.relu(conv(x, w, feature_group_count=2))
        return x

    ws, batches = kernel(2, 3, 3, 2, 4), images()
    method = recipe(rtn(clip="importance", steps=20))
    stacked = quantize_with_evidence({"w": ws}, method, scanned, batches)
    alone = quantize_with_evidence({"w": list(ws)}, method, unrolled, batches)
    for i, q in enumerate(alone.params["w"]):
        np.testing.assert_array_equal(stacked.params["w"].codes[i], q.codes)
    assert [r.tokens for r in stacked.evidence] == [3 * 4 * 6 * 5] * 2


def test_padding_of_a_sequence_changes_nothing():
    fn = lambda p, x: conv(
        jnp.tanh(conv(x, p["a"], (1,), "SAME", ("NHC", "HIO", "NHC"))),
        p["b"],
        (2,),
        "SAME",
        ("NHC", "HIO", "NHC"),
    )
    params = {"a": kernel(3, 4, 4), "b": kernel(3, 4, 4, seed=5)}
    ((x,),) = images(1, (4, 12, 4))
    x = x.at[:, -1].set(0)  # so that no window that counts sees what is behind
    long = jnp.pad(x, ((0, 0), (0, 4), (0, 0)))
    mask = jnp.arange(16)[None] < jnp.full((4, 1), 12)
    method = rtn(clip="importance", steps=20)
    first = Recipe("first", (Rule("a", SPEC, solver=method),))
    short = quantize_with_evidence(params, first, fn, [(x,)])
    masked = quantize_with_evidence(params, first, fn, [(long,)], masks=[mask])
    np.testing.assert_array_equal(masked.params["a"].codes, short.params["a"].codes)
    assert masked.evidence[0].tokens == short.evidence[0].tokens == 48
    both = quantize_with_evidence(params, recipe(method), fn, [(long,)], masks=[mask])
    assert [row.tokens for row in both.evidence] == [48, 24]


def test_a_batch_too_short_for_a_window_teaches_nothing():
    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    act = QuantSpec("int8", "tensor")
    cfg = recipe(gptq(), SPEC, activation=act, static=True)
    params, ((long,),) = {"w": kernel(5, 4, 6)}, images(1, (3, 11, 4))
    short = (long[:, :3],)
    alone = quantize_with_evidence(params, cfg, fn, [(long,)])
    both = quantize_with_evidence(params, cfg, fn, [(long,), short])
    assert both.evidence[0].tokens == alone.evidence[0].tokens == 3 * 4
    for got, want in zip(
        *map(jax.tree.leaves, (both.params, alone.params)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="no token of the calibration data reached"):
        quantize_with_evidence(params, cfg, fn, [short])


def test_a_static_scale_covers_what_the_kernel_meets():
    spec = QuantSpec("int8", "tensor")
    cfg = recipe("rtn", QuantSpec("int8"), activation=spec, static=True)
    params, batches = {"w": kernel(3, 3, 4, 6)}, images(shape=(4, 6, 5, 8))
    q = jaxq.quantize_params(params, cfg, grouped, batches)["w"]
    largest = max(float(jnp.max(jnp.abs(x))) for (x,) in batches)
    assert q.activation_scale.shape == (1, 1, 1, 1)
    np.testing.assert_allclose(q.activation_scale, largest / 127, rtol=1e-6)


def test_feature_groups_that_are_rounded_have_a_static_scale():
    """A preset whose scales span the groups, with a static number."""

    def fn(p, x):
        return conv(x, p["w"], feature_group_count=2)

    params, batches = {"w": kernel(3, 3, 16, 4)}, images(2, (4, 6, 5, 32))
    done = quantize_with_evidence(params, "w4a4-nvfp4", fn, batches)
    assert "2 feature groups" in done.evidence[0].fallback
    largest = max(float(jnp.max(jnp.abs(x))) for (x,) in batches)
    divisor = done.params["w"].activation_scale[0, 0, 0, 0]
    np.testing.assert_allclose(divisor, 6 * 448 / largest, rtol=1e-5)

    def batch_groups(p, x):
        return conv(x, p["w"], batch_group_count=2)

    with pytest.raises(ValueError, match="its convolution has batch groups"):
        quantize_with_evidence(
            {"w": kernel(3, 3, 32, 4)}, "w4a4-nvfp4", batch_groups, batches
        )


def test_images_on_a_mesh_are_summed_over_it():
    fn = lambda p, x: jax.nn.relu(conv(x, p["w"]))
    params, batches = {"w": kernel(3, 3, 4, 8)}, images(2, (8, 6, 5, 4))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    spread = [(jax.device_put(x, place),) for (x,) in batches]
    method = recipe(rtn(clip="importance", steps=20))
    alone = quantize_with_evidence(params, method, fn, batches)
    shared = quantize_with_evidence(params, method, fn, spread)
    np.testing.assert_array_equal(shared.params["w"].codes, alone.params["w"].codes)
    assert shared.evidence[0].tokens == alone.evidence[0].tokens == 2 * 8 * 30
