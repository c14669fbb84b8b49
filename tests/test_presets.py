"""The rules that all presets share, on models that have everything they name."""

import jax
import jax.numpy as jnp
import pytest

from jaxq.plan import plan
from jaxq.presets import PRESETS, as_recipe
from jaxq.spec import QuantSpec
from tests.small_models import tiny_lm, tokens

NAMES = ["w8a16", "w4a16", "w3a16", "w2a16", "w8a8", "w4a8"]
NAMES += ["nf4", "nf4-dq", "fp8", "mxfp4", "nvfp4", "w4a4-nvfp4"]
NAMES += [f"w{bits}a16-{how}" for how in ("gptq", "autoround") for bits in (4, 3, 2)]
NAMES += [f"w{bits}a16-bcq" for bits in (4, 3, 2)]
NAMES += ["w4a16-awq", "w3a16-awq", "w8a8-smoothquant", "w4a8-gptq", "llm-int8"]
ROWS = QuantSpec("int8", "channel")


def rows(name, **options):
    fn, shapes = tiny_lm(**options)
    return {r.path.removeprefix("params/"): r for r in plan(fn, shapes, name, tokens())}


def test_the_names_are_the_fields():
    assert list(PRESETS) == NAMES
    assert all(PRESETS[name].name == name for name in NAMES)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tables_and_heads_are_int8_rows_and_the_rest_is_the_presets(name, scanned):
    found = rows(name, scanned=scanned)
    body = PRESETS[name].rules[-1]
    layer = "layers" if scanned else "layer_0"
    for path in ("embed/embedding", "positions/embedding", "lm_head/kernel"):
        rule = found.pop(path).rule
        assert (rule.weight, rule.activation) == (ROWS, None), path
    for path in ("up/kernel", "down/kernel", "moe/experts"):
        row = found.pop(f"{layer}/{path}")
        assert row.rule is body, path
        # one matrix per layer and, of experts, per expert
        matrices = len(row.shape) - 2
        assert row.stacked == tuple(range(matrices)), path
        assert row.contracting == (matrices,), path
    # what is left: norms, biases and the router, whatever consumes them
    assert not [path for path, row in found.items() if row.is_quantized]
    assert found[f"{layer}/moe/router/kernel"].reason == (
        f"rule {PRESETS[name].rules[0].match!r} keeps it float"
    )
    for path, row in found.items():
        assert "bias" not in path or "not by a product" in row.reason, path


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_table_is_int8_rows_for_both_its_uses(name):
    row = rows(name, tied=True)["embed/embedding"]
    assert set(row.ops) == {"gather", "dot_general"}
    assert row.spec == ROWS
    assert row.contracting == (1,)  # a scale per row serves lookup and product
    assert row.reason == ""


@pytest.mark.parametrize(
    "path",
    [
        "router/kernel",
        "params/layers/3/router/kernel",
        "layers/moe/gate/kernel",
        "block_sparse_moe/top_router/w",
    ],
)
def test_routers_are_known_by_name(path):
    assert as_recipe("w4a16").rule_for(path, ("dot_general",)).weight is None


@pytest.mark.parametrize("path", ["mlp/gate_proj/kernel", "routers/kernel", "gated/w"])
def test_what_is_called_like_a_router_is_none(path):
    assert as_recipe("w4a16").rule_for(path, ("dot_general",)).weight == QuantSpec(
        "uint4", 64, False, scale="bfloat16"
    )


@pytest.mark.parametrize("path", ["lm_head/kernel", "params/head/w", "unembed"])
def test_heads_are_known_by_name(path):
    assert as_recipe("w2a16").rule_for(path, ("dot_general",)).weight == ROWS


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        # bits of a code, plus those of a group's scale and zero point
        ("w8a16", 8 + 32 / 4096),
        ("w4a16", 4 + (16 + 8) / 64),
        ("w3a16", 3 + (16 + 8) / 64),
        ("w2a16", 2 + (16 + 8) / 64),
        ("w8a8", 8 + 32 / 4096),
        ("w4a8", 4 + 16 / 64),
        ("nf4", 4 + 32 / 64),
        ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2),
        ("fp8", 8 + 32 / 4096),
        ("mxfp4", 4 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / 4096**2),
    ],
)
def test_bits_per_weight_of_a_large_matrix(name, bits):
    shapes = {"up": {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}}
    assert plan(None, shapes, name).bits_per_weight == pytest.approx(bits, rel=1e-6)
