"""Blocks that are judged and tuned as a whole: AWQ's search and AutoRound."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import autoround, awq, chain, gptq, quantized, rtn
from jaxq.lift.program import program
from jaxq.pipeline import quantize_with_evidence
from jaxq.pipeline.block import block_function
from jaxq.pipeline.evidence import Evidence
from jaxq.pipeline.tuning import parted, token_weights
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec

N = 16
SPEC = QuantSpec("uint2", 8, symmetric=False)


def recipe(method):
    return Recipe("mine", (Rule("*", SPEC, solver=method),))


def network(params, x):
    """Two blocks of two products each, with what is the same for every layer."""
    for i in range(2):
        layer = params[f"layer_{i}"]
        y = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * layer["norm"]
        x = x + jnp.tanh(y @ layer["up"]) @ layer["down"]
    return x


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) * s[0] ** -0.5, jnp.float32)
    layer = lambda: {"norm": 1 + draw(N), "up": draw(N, 32), "down": draw(32, N)}
    return {"layer_0": layer(), "layer_1": layer()}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(N, N)) * np.exp(rng.normal(size=N))
    return [
        (jnp.asarray(rng.normal(size=(24, N)) @ mix, jnp.float32),) for _ in range(4)
    ]


def output_error(params, done, batches):
    moved = [
        quantized(network)(done.params, x) - network(params, x) for (x,) in batches
    ]
    return float(np.linalg.norm(np.stack(moved)))


def test_tuning_starts_from_gptq_and_never_ends_worse(params, batches):
    start = quantize_with_evidence(params, recipe(gptq()), network, batches)
    tuned = quantize_with_evidence(
        params, recipe(autoround(steps=40, checks=4)), network, batches
    )
    for row in tuned.evidence:
        before, after = row.block_loss
        assert after <= before
        assert row.tokens == 96
    # both weights of a block are tuned together, on its output
    losses = [row.block_loss for row in tuned.evidence]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    before, after = (output_error(params, d, batches) for d in (start, tuned))
    assert after <= before * 1.001
    for name in ("up", "down"):
        a, b = tuned.params["layer_1"][name], start.params["layer_1"][name]
        assert jax.tree.structure(a) == jax.tree.structure(b)
    np.testing.assert_array_equal(
        tuned.params["layer_0"]["norm"], params["layer_0"]["norm"]
    )


def test_a_blocks_function_is_the_same_for_equal_blocks_and_computes_it(
    params, batches
):
    cut = program(network, params, *batches[0])
    one, names = block_function(cut, 0, 1, cut.groups[0].keys + cut.groups[1].keys)
    two, _ = block_function(cut, 2, 3, cut.groups[2].keys + cut.groups[3].keys)
    assert [key.path for key in names.values()] == ["layer_0/up", "layer_0/down"]
    # the second block ends the function, and so hands on nothing else
    assert hash(one) != hash(two) or one == two
    again = block_function(program(network, params, *batches[0]), 0, 1, names.values())
    assert again[0] == one
    assert hash(again[0]) == hash(one)


def test_awq_takes_the_scale_of_least_error_of_the_block(params, batches):
    """No other of its candidates is better, judged by the block's output."""
    done = quantize_with_evidence(
        params,
        recipe(chain(awq(points=6), rtn(clip="mse", steps=20))),
        network,
        batches,
    )
    plain = quantize_with_evidence(
        params, recipe(rtn(clip="mse", steps=20)), network, batches[:1]
    )
    assert output_error(params, done, batches) < output_error(params, plain, batches)
    q = done.params["layer_0"]["up"]
    assert q.input_scale is not None
    scale = np.asarray(q.input_scale)[:, 0]
    assert np.sqrt(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-4)


def test_awq_does_not_judge_by_padding(params, batches):
    """The scales are those without it, however large it is."""
    cfg, rng = recipe(chain(awq(points=6), rtn())), np.random.default_rng(4)
    plain = quantize_with_evidence(params, cfg, network, batches)
    padded, masks = [], []
    for (x,) in batches:
        rubbish = 100 * rng.normal(size=x.shape).astype(np.float32)
        padded.append((jnp.concatenate([x, rubbish]),))
        masks.append(jnp.arange(2 * len(x)) < len(x))
    masked = quantize_with_evidence(params, cfg, network, padded, masks=masks)
    for found, want in zip(
        jax.tree.leaves(masked.params), jax.tree.leaves(plain.params), strict=True
    ):
        if jnp.issubdtype(found.dtype, jnp.floating):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def wide():
    """Blocks where GPTQ leaves room for better ones; data, and other data."""
    rng = np.random.default_rng(2)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) * s[0] ** -0.5, jnp.float32)
    layer = lambda: {"norm": 1 + draw(48), "up": draw(48, 96), "down": draw(96, 48)}
    params = {"layer_0": layer(), "layer_1": layer()}
    mix = rng.normal(size=(48, 48)) * np.exp(rng.normal(size=48))
    seen = lambda: [
        (jnp.asarray(rng.normal(size=(64, 48)) @ mix, jnp.float32),) for _ in range(6)
    ]
    spec = QuantSpec("uint2", 16, symmetric=False)

    def solve(method, data, activation=None):
        rule = Rule("*", spec, activation=activation, solver=method)
        return quantize_with_evidence(params, Recipe("mine", (rule,)), network, data)

    data, other = seen(), seen()
    start = output_error(params, solve(gptq(), data), other)
    return params, data, other, solve, start


@pytest.mark.parametrize(
    ("before", "activation"),
    [((), None), ((awq(points=6),), QuantSpec("int8", "token"))],
    ids=["alone", "after awq, activations in 8 bits"],
)
def test_tuning_gains_on_data_it_did_not_see(wide, before, activation):
    """A tenth and more of GPTQ's error; a fifth is usual here."""
    params, data, other, solve, start = wide
    method = chain(*before, autoround(steps=60, checks=6))
    tuned = solve(method, data, activation)
    assert output_error(params, tuned, other) < 0.9 * start
    for row in tuned.evidence:
        assert row.block_loss[1] < row.block_loss[0]
        assert row.fallback is None
    weights = [tuned.params[f"layer_{i}"][n] for i in (0, 1) for n in ("up", "down")]
    assert {q.activation for q in weights} == {activation}


@pytest.mark.parametrize("losses", [(1.0, 0.5), (np.inf, np.nan)])
def test_a_block_whose_loss_overflows_can_be_told_as_json(losses):
    """The squares of outputs of 1e20 are not finite, and the outputs are."""
    row = Evidence("w", "autoround", 8, 1.0, 2.0, None, None, 0.0, block_loss=losses)
    told = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert told.get("block_loss") == ([1.0, 0.5] if losses[0] == 1 else None)


# ------------------------------------------------------------------------ what counts


def test_a_token_counts_by_one_over_its_size(rng):
    """Oracle: the equation in float64; of padding neither size nor weight matters."""
    y = rng.standard_normal((3, 2, 5, 8)) * 10.0 ** rng.integers(-1, 3, (3, 2, 5, 1))
    y[0, 0, 1] = 0
    mask = rng.random((3, 2, 5)) < 0.7
    mask[0, 0, 1] = True
    soiled = np.where(mask[..., None], y, 1e15)
    sizes = np.mean(y**2, -1)
    least = 1e-3 * np.median(sizes[mask])
    expected = mask / np.maximum(sizes, least)
    got = token_weights(jnp.asarray(soiled, jnp.float32), jnp.asarray(mask, "f4"))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # a mask of the batch alone, one of tokens that this output does not have, and none
    rows = jnp.asarray([[1, 0], [1, 1], [0, 1]], jnp.float32)
    pooled = jnp.asarray(y[:, :, 0], jnp.float32)
    np.testing.assert_array_equal(token_weights(pooled, rows)[0, 1], 0)
    every = token_weights(pooled, None)
    assert np.all(np.asarray(every) > 0)
    np.testing.assert_array_equal(token_weights(pooled, jnp.asarray(mask)), every)
    np.testing.assert_array_equal(token_weights(jnp.zeros(4), None), np.ones(4))
    np.testing.assert_array_equal(token_weights(jnp.zeros((2, 4)), None), [1, 1])


def test_every_sixteenth_batch_judges():
    seen, held = parted(range(64))
    assert held == [15, 31, 47, 63]
    assert sorted(seen + held) == list(range(64))
    assert parted(range(15)) == (list(range(15)), [])


def test_held_batches_judge_by_errors_relative_to_each_token(params):
    """Oracle: the last block's loss, of the whole network's outputs, in float64."""
    rng = np.random.default_rng(3)
    sizes = 10.0 ** rng.uniform(-1, 1, (16, 24, 1))
    data = [
        (jnp.asarray(x, jnp.float32),) for x in sizes * rng.normal(size=(16, 24, N))
    ]
    method = autoround(steps=8, checks=2)
    done = quantize_with_evidence(params, recipe(method), network, data)
    x = data[15][0]
    target = np.asarray(network(params, x), np.float64)
    moved = np.asarray(quantized(network)(done.params, x), np.float64) - target
    relative = np.mean(np.sum(moved**2, -1) / np.sum(target**2, -1))
    assert done.evidence[-1].block_loss[1] == pytest.approx(relative, rel=1e-3)
    assert relative != pytest.approx(np.sum(moved**2) / np.sum(target**2), rel=1e-2)
