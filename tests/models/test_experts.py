"""Mixtures of experts: the product against a loop, and calibrating stacked experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.lm import load_model
from jaxq.models.experts import Experts, ExpertsConfig
from jaxq.qtensor import QTensor
from jaxq.streaming import quantize_to
from tests.models.seeded import stored_config, write_seeded

CONFIG = ExpertsConfig(
    vocab_size=8,
    hidden_size=6,
    intermediate_size=10,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    num_experts=4,
    per_token=2,
    expert_size=10,
    init_scale=0.5,
)
TOKENS = np.random.default_rng(3).integers(2, 64, (4, 32)).astype(np.int32)


def test_every_token_is_the_weighted_sum_of_its_experts(rng):
    module = Experts(CONFIG)
    x = rng.normal(size=(7, 6)).astype(np.float32)
    chosen = np.array([[0, 2], [2, 0], [3, 2], [4, 4], [0, 3], [2, 3], [4, 0]])
    weights = rng.uniform(size=(7, 2)).astype(np.float32)
    given = (jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights))
    params = jax.jit(module.init)(jax.random.key(0), *given)
    gate, up, down = (np.asarray(params["params"][n]) for n in Experts.NAMES)
    want = np.zeros_like(x)
    for m, j in np.ndindex(chosen.shape):
        e = chosen[m, j]
        if e < 4:  # a number behind the last is nobody
            a = x[m] @ gate[e]
            inner = a / (1 + np.exp(-a)) * (x[m] @ up[e])
            want[m] += weights[m, j] * (inner @ down[e])
    got = jax.jit(module.apply)(params, *given)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral; no token goes to the last expert of its second layer."""
    folder = write_seeded(tmp_path_factory.mktemp("moe"), stored_config("mixtral"))
    model = load_model(folder, jnp.float32)
    router = model.params["params"]["layers_1"]["block_sparse_moe"]["gate"]
    # One of the first two scores is positive and one negative; of the last two, which
    # are 0, the first one wins.
    kernel = np.array(router["kernel"])
    kernel[:, 1], kernel[:, 2:] = -kernel[:, 0], 0
    router["kernel"] = jnp.asarray(kernel)
    return model


@pytest.fixture(scope="module")
def small(mixtral):
    return mixtral.quantize("w4a16-gptq", calibration=TOKENS, group_size=16)


def test_experts_are_solved_together_on_their_own_tokens(small):
    rows = {p: r for p, r in small.evidence.items() if "/experts/" in p}
    assert len(rows) == 6
    for path, row in rows.items():
        leaf = small.params
        for key in path.split("/"):
            leaf = leaf[key]
        assert isinstance(leaf, QTensor)
        assert leaf.shape[0] == len(row["experts"]) == 4
        # every token goes to two of four
        assert sum(row["experts"]) == row["tokens"] == 2 * TOKENS.size
        assert row["loss"] < 0.95 * row["rtn_loss"], path
        assert "sorted by expert" in row["note"]


def test_an_idle_expert_is_rounded_and_said_to_be(small):
    idle = {p: r for p, r in small.evidence.items() if "layers_1" in p}
    idle = {p: r for p, r in idle.items() if "/experts/" in p}
    for path, row in idle.items():
        assert row["experts"][3] == 0, path
        assert row["fallback"] == "rounded to nearest where no token came: experts 3"
    busy = [r for p, r in small.evidence.items() if "layers_0" in p]
    assert all(row["fallback"] is None for row in busy)


def test_the_router_stays_float(small):
    gate = small.params["params"]["layers_0"]["block_sparse_moe"]["gate"]["kernel"]
    assert gate.dtype == jnp.float32
    assert not isinstance(gate, QTensor)


@pytest.mark.slow
def test_generation_reads_quantized_experts(small):
    from jaxq.generation import generate

    texts = generate(small.apply, small.params, small.config, [[3, 5, 7]], 4)
    whole = small.apply(small.params, jnp.asarray([[3, 5, 7, *texts[0][:3]]]))
    assert jnp.argmax(whole[0, 2:], axis=-1).tolist() == texts[0]


def test_experts_that_are_read_one_by_one_are_the_same(tmp_path):
    folder = write_seeded(tmp_path / "moe", stored_config("qwen3_moe"))
    lazy = load_model(folder, jnp.float32, lazy=True)
    experts = lazy.params["params"]["layers_0"]["mlp"]["experts"]["down_proj"]
    assert repr(experts).startswith("LazyStack(float32[6, 24, 32]")
    quantize_to(lazy, tmp_path / "small", "w8a16")
    again = load_model(tmp_path / "small").params
    want = load_model(folder, jnp.float32).quantize("w8a16").params
    assert jax.tree.all(jax.tree.map(np.array_equal, again, want))
