"""Calibration in sequence, against doing it by hand, for all kinds of functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq import chain, gptq, quantized, rtn, smoothquant, split
from jaxq.pipeline import quantize_with_evidence
from jaxq.pipeline.store import as_multiplied
from jaxq.qtensor import QTensor
from jaxq.quantize import quantize
from jaxq.recipe import Recipe, Rule
from jaxq.solvers import Statistics, solve_with
from jaxq.spec import QuantSpec

SPEC = QuantSpec("uint2", 8, symmetric=False)
GPTQ = Recipe("gptq", (Rule("*", SPEC, solver=gptq()),))
N = 8


def recipe(method, spec=SPEC, **more):
    return Recipe("mine", (Rule("*", spec, solver=method, **more),))


def weights(*names, shape=(N, N), seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for n in names}


def data(count=3, rows=16, seed=1, width=N):
    """Batches whose channels are correlated and of very different size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.exp(rng.normal(size=width))
    return [
        (jnp.asarray(rng.normal(size=(rows, width)) @ mix, jnp.float32),)
        for _ in range(count)
    ]


def network(params, x):
    """Two layers side by side, and two behind them."""
    y = jnp.tanh(x @ params["a"]) + jax.nn.relu(x @ params["b"])
    return jnp.tanh(y @ params["c"]) @ params["d"]


@functools.cache
def by_hand_solver():
    return jax.jit(
        lambda w, gram, tokens: (
            solve_with(
                w,
                Statistics(gram, tokens),
                spec=SPEC,
                solver="gptq",
                options=(),
                contracting=(0,),
                stacked=(),
            ).weight
        )
    )


def by_hand(weight, activations):
    """GPTQ of one weight from the activations themselves."""
    x = np.concatenate([np.asarray(a, np.float64).reshape(-1, N) for a in activations])
    gram = jnp.asarray(x.T @ x, jnp.float32)
    return by_hand_solver()(weight, gram, jnp.int32(len(x)))


def assert_same_codes(found, expected):
    """Codes may differ where a sum was rounded differently: in next to none."""
    a, b = np.asarray(found.code_values()), np.asarray(expected.code_values())
    assert np.mean(a != b) <= 0.02
    np.testing.assert_allclose(found.scale_values(), expected.scale_values(), rtol=1e-4)


def test_every_layer_is_solved_on_what_the_quantized_ones_before_it_compute():
    params, batches = weights("a", "b", "c", "d"), data()
    found = quantize_with_evidence(params, GPTQ, network, batches).params
    x = [batch[0] for batch in batches]
    assert_same_codes(found["a"], by_hand(params["a"], x))
    assert_same_codes(found["b"], by_hand(params["b"], x))
    a, b = found["a"].dequantize(), found["b"].dequantize()
    y = [jnp.tanh(v @ a) + jax.nn.relu(v @ b) for v in x]
    assert_same_codes(found["c"], by_hand(params["c"], y))
    z = [jnp.tanh(v @ found["c"].dequantize()) for v in y]
    assert_same_codes(found["d"], by_hand(params["d"], z))
    # on the float prefix the last layer would be another one
    exact = [jnp.tanh(v @ params["a"]) + jax.nn.relu(v @ params["b"]) for v in x]
    other = by_hand(params["d"], [jnp.tanh(v @ params["c"]) for v in exact])
    assert np.any(found["d"].codes != other.codes)


def test_evidence_is_what_numpy_says():
    params, batches = weights("a", "b", "c", "d"), data()
    done = quantize_with_evidence(params, GPTQ, network, batches)
    rows = {row.path: row for row in done.evidence}
    assert list(rows) == ["a", "b", "c", "d"]
    x = np.concatenate([np.float64(batch[0]) for batch in batches])
    w, q = np.float64(params["a"]), np.float64(done.params["a"].dequantize())
    near = np.float64(quantize(params["a"], SPEC, 0).dequantize())
    row = rows["a"]
    assert row.tokens == 48
    assert row.loss == pytest.approx(np.mean((x @ (q - w)) ** 2), rel=1e-3)
    assert row.rtn_loss == pytest.approx(np.mean((x @ (near - w)) ** 2), rel=1e-3)
    assert row.ratio < 1
    assert row.damping == pytest.approx(0.05)
    assert row.order == "activation"
    assert row.fallback is None
    assert row.seconds > 0


def einsum(params, x):
    """The weight on the left, transposed, and with heads."""
    y = jnp.einsum("nk,bk->bn", params["a"], x)
    heads = params["b"].reshape(2, N // 2, N)
    y = jnp.einsum("bhd,hdn->bn", jnp.tanh(y).reshape(-1, 2, N // 2), heads)
    return y @ params["c"].T


def scanned(params, x):
    step = lambda c, w: (jnp.tanh(c @ w), None)
    return jax.lax.scan(step, x, params["w"])[0]


def looped(params, x):
    y = x
    for i in range(3):
        y = jnp.tanh(y @ params[f"w{i}"])
    return y


def test_the_weight_may_stand_anywhere():
    params, batches = weights("a", "b", "c"), data()
    done = quantize_with_evidence(params, GPTQ, einsum, batches)
    for row in done.evidence:
        assert row.tokens == 48
        assert row.ratio < 1
        assert row.fallback is None
    x = batches[0][0]
    got, exact = quantized(einsum)(done.params, x), einsum(params, x)
    rough = quantized(einsum)(
        quantize_with_evidence(params, recipe(rtn()), einsum, batches[:1]).params, x
    )
    assert jnp.linalg.norm(got - exact) < jnp.linalg.norm(rough - exact)


def test_a_scan_over_layers_is_the_layers_one_by_one():
    one = weights("w0", "w1", "w2")
    stacked = {"w": jnp.stack(list(one.values()))}
    apart = quantize_with_evidence(one, GPTQ, looped, data())
    together = quantize_with_evidence(stacked, GPTQ, scanned, data())
    assert [row.path for row in together.evidence] == ["w[0]", "w[1]", "w[2]"]
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], together.params["w"])
        np.testing.assert_array_equal(layer.codes, apart.params[f"w{i}"].codes)
        np.testing.assert_array_equal(layer.scales, apart.params[f"w{i}"].scales)
    whole = quantize(stacked["w"], SPEC, 1, stacked=(0,))
    assert jax.tree.structure(whole) == jax.tree.structure(together.params["w"])
    x = data()[0][0]
    got = quantized(scanned)(together.params, x)
    want = quantized(looped)(apart.params, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def batched_experts(params, x):
    """Tokens in slots of their experts; slots that are not taken are zeros."""
    return jnp.einsum("etk,ekn->etn", x, params["w"])


def ragged_experts(params, x, sizes):
    return jax.lax.ragged_dot(x, params["w"], sizes)


@pytest.mark.parametrize("kind", ["batched", "ragged"])
def test_experts_have_statistics_of_their_own(kind):
    w, x = weights("w", shape=(3, N, N))["w"], data(1, rows=24)[0][0]
    sizes = np.asarray([14, 0, 10])  # the second expert gets no token
    rows = np.split(np.asarray(x), np.cumsum(sizes)[:-1])
    if kind == "batched":
        slots = np.zeros((3, 16, N), np.float32)
        for expert, own in enumerate(rows):
            slots[expert, : len(own)] = own
        fn, batch = batched_experts, (jnp.asarray(slots),)
    else:
        fn, batch = ragged_experts, (x, jnp.asarray(sizes, jnp.int32))
    done = quantize_with_evidence({"w": w}, GPTQ, fn, [batch])
    (row,) = done.evidence
    assert row.experts == (14, 0, 10)
    assert row.tokens == 24
    assert row.fallback == "rounded to nearest where no token came: experts 1"
    for expert in (0, 2):
        alone = by_hand(w[expert], [rows[expert]])
        mine = jax.tree.map(lambda a, e=expert: a[e], done.params["w"])
        assert_same_codes(mine, alone)
    idle = jax.tree.map(lambda a: a[1], done.params["w"]).dequantize()
    assert jnp.all(jnp.isfinite(idle))
    step = jnp.max(jnp.abs(w[1]))
    assert jnp.max(jnp.abs(idle - w[1])) < step


def test_padding_changes_nothing():
    params, batches = weights("a", "b", "c", "d"), data(2)
    plain = quantize_with_evidence(params, GPTQ, network, batches)
    rng = np.random.default_rng(3)
    padded, masks = [], []
    for (x,) in batches:
        rubbish = 100 * rng.normal(size=(7, N)).astype(np.float32)
        padded.append((jnp.concatenate([x, rubbish]),))
        masks.append(jnp.arange(23) < 16)
    masked = quantize_with_evidence(params, GPTQ, network, padded, masks=masks)
    for name in params:
        assert_same_codes(masked.params[name], plain.params[name])
    assert [r.tokens for r in masked.evidence] == [32] * 4
    with pytest.raises(ValueError, match="1 entries for 2 calibration batches"):
        quantize_with_evidence(params, GPTQ, network, padded, masks=masks[:1])


def test_data_on_a_mesh_is_summed_over_it():
    params, batches = weights("a", "b", "c", "d"), data(2)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    spread = [(jax.device_put(x, place),) for (x,) in batches]
    alone = quantize_with_evidence(params, GPTQ, network, batches)
    shared = quantize_with_evidence(params, GPTQ, network, spread)
    for name in params:
        assert_same_codes(shared.params[name], alone.params[name])
    assert [r.tokens for r in shared.evidence] == [32] * 4


def test_batches_of_several_shapes_are_one_calibration():
    params, (batch, *_) = weights("a", "b", "c", "d"), data(1, rows=16)
    x = batch[0]
    whole = quantize_with_evidence(params, GPTQ, network, [(x,)])
    parts = quantize_with_evidence(params, GPTQ, network, [(x[:11],), (x[11:],)])
    for name in params:
        assert_same_codes(parts.params[name], whole.params[name])


def test_weights_without_data_lie_on_the_way():
    """A float and a rounded layer before a calibrated one are what it sees."""
    rules = (Rule("a"), Rule("b", SPEC), Rule("*", SPEC, solver=gptq()))
    params, batches = weights("a", "b", "c", "d"), data()
    found = quantize_with_evidence(params, Recipe("some", rules), network, batches)
    assert found.params["a"] is params["a"]
    b = quantize(params["b"], SPEC, 0)
    np.testing.assert_array_equal(found.params["b"].codes, b.codes)
    x = [batch[0] for batch in batches]
    y = [jnp.tanh(v @ params["a"]) + jax.nn.relu(v @ b.dequantize()) for v in x]
    assert_same_codes(found.params["c"], by_hand(params["c"], y))
    assert {r.path: r.tokens for r in found.evidence}["b"] == 0


def recurrent(params, x):
    """One weight in every step of a scan, and one in two places."""
    step = lambda c, v: (jnp.tanh(v + c @ params["loop"]), None)
    y = jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]
    return jnp.tanh(y @ params["twice"]) @ params["twice"]


def test_what_cannot_be_reached_in_sequence_is_calibrated_in_one_shot_and_says_so():
    params = weights("loop", "twice")
    rng = np.random.default_rng(5)
    batches = [
        (jnp.asarray(rng.normal(size=(6, 4, N)), jnp.float32),) for _ in range(2)
    ]
    done = quantize_with_evidence(params, GPTQ, recurrent, batches)
    rows = {row.path: row for row in done.evidence}
    assert rows["loop"].note.startswith("calibrated in one shot on the float model: ")
    assert "2 products at different places share it" in rows["twice"].note
    assert rows["loop"].tokens == 2 * 6 * 4
    assert rows["twice"].tokens == 2 * 2 * 4
    states, seen = [], []
    for (x,) in batches:
        c = jnp.zeros((4, N))
        for v in x:
            states.append(c)
            c = jnp.tanh(v + c @ params["loop"])
        seen += [c, jnp.tanh(c @ params["twice"])]
    assert_same_codes(done.params["loop"], by_hand(params["loop"], states))
    assert_same_codes(done.params["twice"], by_hand(params["twice"], seen))


def twice(params, x):
    """One weight in two places."""
    return jnp.tanh(x @ params["w"]) @ params["w"]


def test_in_one_shot_nothing_has_drifted():
    """Presets make up for drift; on the float model there is none."""
    params, batches = weights("w"), data()
    drifting = Recipe("drift", (Rule("*", SPEC, solver=gptq(drift=0.75)),))
    done = quantize_with_evidence(params, drifting, twice, batches)
    plain = quantize_with_evidence(params, GPTQ, twice, batches)
    assert_same_codes(done.params["w"], plain.params["w"])
    assert done.evidence[0].note == plain.evidence[0].note


def test_static_zero_points_found_in_one_shot_may_be_above_127():
    """Activations that reach further below 0 than above have such zero points."""
    unsigned = QuantSpec("uint8", "tensor", symmetric=False)
    params = {"w": jnp.abs(weights("w")["w"])}
    batches = [(-jnp.abs(x),) for (x,) in data()]
    rule = Rule("*", QuantSpec("int8", "channel"), unsigned, static=True)
    small = quantize_with_evidence(params, Recipe("s", (rule,)), twice, batches).params
    assert int(small["w"].activation_zero[0, 0]) > 127
    ((x,), *_), exact = batches, jax.jit(twice)
    error = quantized(twice)(small, x) - exact(params, x)
    assert jnp.linalg.norm(error) < 0.05 * jnp.linalg.norm(exact(params, x))


def test_what_no_tap_reaches_is_rounded_and_says_so():
    def fn(params, x):
        small = lambda c: jnp.sum(c * c) < 10.0
        y = jax.lax.while_loop(small, lambda c: 2.0 * c @ params["loop"], x)
        return y @ params["out"]

    params = weights("loop", "out")
    done = quantize_with_evidence(params, GPTQ, fn, data())
    rows = {row.path: row for row in done.evidence}
    assert rows["loop"].fallback == (
        "rounded to nearest: its product is inside a loop or a branch"
    )
    near = quantize(params["loop"], SPEC, 0)
    np.testing.assert_array_equal(done.params["loop"].codes, near.codes)
    assert rows["out"].fallback is None


# ------------------------------------------------------------------------ transforms


def test_consumers_of_one_activation_share_the_scale_and_others_have_their_own():
    method = chain(smoothquant(0.5), rtn())
    spec = QuantSpec("int8")
    params, batches = weights("a", "b", "c", "d"), data()
    done = quantize_with_evidence(params, recipe(method, spec), network, batches).params
    np.testing.assert_array_equal(done["a"].input_scale, done["b"].input_scale)
    assert np.any(done["a"].input_scale != done["c"].input_scale)
    x = np.concatenate([np.asarray(batch[0]) for batch in batches])
    w = np.maximum(np.abs(params["a"]).max(1), np.abs(params["b"]).max(1))
    s = np.sqrt(np.abs(x).max(0) / w)
    np.testing.assert_allclose(done["a"].input_scale[:, 0], 1 / s, rtol=1e-5)
    expected = quantize(params["a"] * s[:, None], spec, 0).dequantize() / s[:, None]
    np.testing.assert_allclose(done["a"].dequantize(), expected, rtol=1e-4, atol=1e-6)
    got = quantized(network)(done, batches[0][0])
    np.testing.assert_allclose(got, network(params, batches[0][0]), atol=0.1)


def test_a_transform_and_gptq_solve_the_changed_weight_with_the_changed_gram():
    method = chain(smoothquant(0.5), gptq())
    params, batches = weights("a"), data()
    q = quantize_with_evidence(params, recipe(method), single, batches).params["a"]
    s = 1 / np.asarray(q.input_scale)[:, 0]
    changed = by_hand(params["a"] * s[:, None], [batch[0] / s for batch in batches])
    assert_same_codes(q, changed)


def single(params, x):
    return x @ params["a"]


def test_split_channels_compute_the_same_product():
    params = weights("a", shape=(32, 8))
    params["a"] = params["a"].at[5].mul(12.0)
    batches, spec = data(width=32), QuantSpec("int8", "tensor")
    plain = quantize_with_evidence(params, recipe(rtn(), spec), single, batches[:1])
    done = quantize_with_evidence(
        params, recipe(chain(split(0.1), rtn()), spec), single, batches
    )
    q = done.params["a"]
    assert q.shape == (32, 8)
    assert q.stored_shape == (36, 8)
    x = batches[0][0]
    exact = x @ params["a"]
    error = jnp.linalg.norm(quantized(single)(done.params, x) - exact)
    assert error < 0.5 * jnp.linalg.norm(quantized(single)(plain.params, x) - exact)
    transposed = lambda p, x: x @ p["a"].T
    wide, cut = weights("a", shape=(8, 32)), recipe(chain(split(0.1)))
    with pytest.raises(ValueError, match=r"contracts \(1,\): leave it out"):
        quantize_with_evidence(wide, cut, transposed, batches)


def test_static_scales_see_the_transformed_activation():
    method = chain(smoothquant(0.5), rtn())
    static = {"activation": QuantSpec("int8", "tensor"), "static": True}
    params, batches = weights("a"), data()
    done = quantize_with_evidence(
        params, recipe(method, QuantSpec("int8"), **static), single, batches
    )
    q = done.params["a"]
    x = np.concatenate([np.asarray(batch[0]) for batch in batches])
    largest = np.abs(x * np.asarray(q.input_scale)[:, 0]).max()
    assert q.activation_scale[0, 0] == pytest.approx(largest / 127, rel=1e-5)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_named(value):
    batches = data()
    batches[1] = (batches[1][0].at[3, 2].set(value),)
    with pytest.raises(
        ValueError,
        match=r"'a' and 'b' meets holds NaN or Inf in calibration batch 1 of 3",
    ):
        quantize_with_evidence(weights("a", "b", "c", "d"), GPTQ, network, batches)


def test_float16_that_overflows_gets_a_hint():
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    params = {k: jnp.full((N, N), 200.0, jnp.float16) for k in "ab"}
    x = (
        jnp.full((4, N), 200.0, jnp.float16)
        * jnp.arange(1, 5, dtype=jnp.float16)[:, None]
    )
    with pytest.raises(ValueError, match="float16 overflows beyond 65504"):
        quantize_with_evidence(params, GPTQ, fn, [(x,)])


def test_constant_activations_are_refused():
    with pytest.raises(ValueError, match="is the same for all 16 tokens"):
        quantize_with_evidence(weights("a"), GPTQ, single, [(jnp.ones((16, N)),)])


def test_a_weight_that_no_token_reaches_is_refused():
    masks = [jnp.zeros(16, bool)] * 3
    with pytest.raises(
        ValueError, match="no token of the calibration data reached 'a'"
    ):
        quantize_with_evidence(weights("a"), GPTQ, single, data(), masks=masks)


def test_one_token_is_enough_to_do_something_sound():
    done = quantize_with_evidence(weights("a"), GPTQ, single, data(1, rows=1))
    (row,) = done.evidence
    assert row.tokens == 1
    assert row.loss <= row.rtn_loss
    assert row.note.startswith("1 tokens for 8 inputs: its loss says little")
    assert bool(jnp.all(jnp.isfinite(done.params["a"].dequantize())))
    (row,) = quantize_with_evidence(weights("a"), GPTQ, single, data()).evidence
    assert row.note is None


def test_dead_channels_are_rounded_to_nearest():
    batches = [(x.at[:, :3].set(0.0),) for (x,) in data()]
    done = quantize_with_evidence(weights("a"), GPTQ, single, batches)
    q = done.params["a"]
    assert isinstance(q, QTensor)
    half = np.repeat(np.asarray(q.scale_values()), N, 0)[:3] / 2
    exact = np.asarray(weights("a")["a"])[:3]
    assert np.all(np.abs(np.asarray(q.dequantize())[:3] - exact) <= half * 3)
    assert done.evidence[0].fallback is None


def test_a_gram_that_overflows_falls_back_and_says_so():
    huge = [(x * jnp.float32(1e20),) for (x,) in data()]
    done = quantize_with_evidence(weights("a"), GPTQ, single, huge)
    assert done.evidence[0].fallback == (
        "rounded to nearest: its Gram matrix is not finite"
    )
    near = quantize(weights("a")["a"], SPEC, 0)
    np.testing.assert_array_equal(done.params["a"].codes, near.codes)


def test_data_is_asked_for():
    with pytest.raises(
        ValueError, match="'a/kernel' is quantized by gptq, which needs"
    ):
        quantize_with_evidence({"a": {"kernel": jnp.ones((N, N))}}, GPTQ)
    shapes = [(jax.ShapeDtypeStruct((16, N), jnp.float32),)]
    with pytest.raises(ValueError, match="has shapes and no numbers"):
        quantize_with_evidence(weights("a"), GPTQ, single, shapes)
    with pytest.raises(ValueError, match="fn= was given without a batch"):
        quantize_with_evidence(weights("a"), GPTQ, single, [])


def test_streams_run_one_compiled_function() -> None:
    """A quantized weight runs as numbers, as the float one did."""
    w = jax.random.normal(jax.random.key(0), (64, 32))
    q = quantize(w, QuantSpec("uint4", 32, symmetric=False), 0)
    assert jnp.array_equal(as_multiplied(q), q.dequantize())
    both = dataclasses.replace(q, activation=QuantSpec("int8", "token"))
    assert as_multiplied(both) is both
