"""The numbers of a report against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.pipeline import quantize_params
from jaxq.presets import PRESETS
from jaxq.report import (
    capture_activations,
    channels_of,
    distribution_of,
    group_by_kind,
    matrix_errors,
)
from jaxq.report.measure import place

IN, MIDDLE, OUT, VOCAB = 64, 128, 32, 16


def forward(params, tokens):
    """Two matrices and an embedding that is used twice."""
    p = params["params"]
    x = p["embed"]["embedding"][tokens]
    x = jnp.tanh(x @ p["layers_0"]["up"]["kernel"])
    x = x @ p["layers_1"]["down"]["kernel"]
    return x @ p["embed"]["embedding"].T


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)

    def make(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "params": {
            "embed": {"embedding": make(VOCAB, IN)},
            "layers_0": {"up": {"kernel": make(IN, MIDDLE)}},
            "layers_1": {"down": {"kernel": make(MIDDLE, IN)}},
        }
    }


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(4).integers(0, VOCAB, (2, 20)), jnp.int32)


@pytest.fixture(scope="module")
def activations(params, tokens):
    return capture_activations(forward, params, tokens)


def exact_inputs(params, tokens):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    first = p["embed"]["embedding"][np.asarray(tokens)].reshape(-1, IN)
    second = np.tanh(first @ p["layers_0"]["up"]["kernel"])
    third = second @ p["layers_1"]["down"]["kernel"]
    return p, first, second, third


def test_activations_are_the_inputs_of_products(params, tokens, activations):
    _, first, second, third = exact_inputs(params, tokens)
    for path, exact in (
        ("params/layers_0/up/kernel", first),
        ("params/layers_1/down/kernel", second),
        ("params/embed/embedding", third),
    ):
        np.testing.assert_allclose(activations[path], exact, rtol=1e-4, atol=1e-4)


def test_activations_are_thinned_evenly(params, tokens, activations):
    path = "params/layers_0/up/kernel"
    few = capture_activations(forward, params, tokens, rows=10)[path]
    np.testing.assert_array_equal(few, activations[path][::4])


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_errors_of_weights_and_outputs(params, tokens, activations, recipe):
    qparams = quantize_params(params, PRESETS[recipe], forward, [(tokens,)])
    found = {
        e.path: e for e in matrix_errors(recipe, forward, params, qparams, activations)
    }
    p, first, second, _ = exact_inputs(params, tokens)
    for layer, name, x in ((0, "up", first), (1, "down", second)):
        w = p[f"layers_{layer}"][name]["kernel"]
        q = qparams["params"][f"layers_{layer}"][name]["kernel"]
        close = np.asarray(q.dequantize(jnp.float32), np.float64)
        seen = x
        if recipe == "w8a8":
            scale = np.abs(x).max(-1, keepdims=True) / 127
            seen = np.round(x / scale) * scale
        error = found[f"params/layers_{layer}/{name}/kernel"]
        assert (error.recipe, error.kind, error.layer) == (recipe, name, layer)
        np.testing.assert_allclose(
            error.weight, np.linalg.norm(w - close) / np.linalg.norm(w), rtol=1e-4
        )
        np.testing.assert_allclose(
            error.output,
            np.linalg.norm(x @ w - seen @ close) / np.linalg.norm(x @ w),
            rtol=5e-3,
        )
    assert found["params/embed/embedding"].layer is None


def test_place():
    assert place("params/layers_3/mlp/up_proj/kernel") == ("mlp/up_proj", 3)
    assert place("params/h/11/attn/kernel") == ("h/attn", 11)
    assert place("params/lm_head/kernel") == ("lm_head", None)
    assert place("w") == ("w", None)


def test_histograms_count_everything_once(rng):
    arrays = {
        "a/layers_0": rng.normal(size=5000),
        "a/layers_1": 40 * np.append(rng.normal(size=4999), 30.0),
    }
    found = distribution_of("a", arrays)
    scaled = np.concatenate([v / v.std() for v in arrays.values()])
    assert found.total == 10_000
    assert found.outliers == int((np.abs(scaled) > 6).sum()) == 1
    np.testing.assert_allclose(found.largest, np.abs(scaled).max())
    assert found.largest_at == "a/layers_1"
    inside = (scaled >= found.edges[40]) & (scaled < found.edges[41])
    assert found.counts[40] == inside.sum()


def test_a_constant_array_has_a_histogram():
    found = distribution_of("zeros", {"zeros": np.zeros((4, 4))})
    assert (found.total, found.outliers, found.largest) == (16, 0, 0)


def test_channels_and_kinds(rng):
    x = rng.normal(size=(50, 8))
    np.testing.assert_array_equal(channels_of("x", x).largest, np.abs(x).max(0))
    groups = group_by_kind({f"params/layers_{i}/q/kernel": jnp.ones(2) for i in (0, 1)})
    assert {k: list(v) for k, v in groups.items()} == {
        "q": ["params/layers_0/q/kernel", "params/layers_1/q/kernel"]
    }
