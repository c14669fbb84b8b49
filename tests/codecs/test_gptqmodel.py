"""What we write, loaded by GPTQModel on a CPU: GPTQ v1 and v2, and AWQ gemm."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, Recipe, Rule
from tests.tiny_lm import write_tiny

pytestmark = [pytest.mark.compare, pytest.mark.filterwarnings("ignore")]

TOKENS = np.arange(20, dtype=np.int32)[None]
SYMMETRIC = {"grid": "gptq", "scale": "float16"}
ASYMMETRIC = {"symmetric": False, "scale": "float16"}
# target, how weights are quantized, the layout that is expected of it
WRITTEN = [
    ("gptq", QuantSpec("int4", 32, **SYMMETRIC), "gptq"),
    ("gptq", QuantSpec("int8", **SYMMETRIC), "gptq"),
    ("gptq", QuantSpec("uint2", 32, **ASYMMETRIC), "gptq"),
    ("gptq", QuantSpec("uint3", 32, **ASYMMETRIC), "gptq"),
    ("gptq", QuantSpec("uint4", 64, **ASYMMETRIC), "gptq"),
    ("gptq", QuantSpec("uint8", 32, **ASYMMETRIC), "gptq"),
    ("awq", QuantSpec("uint4", 32, **ASYMMETRIC), "gemm"),
    ("awq", QuantSpec("int4", 128, **SYMMETRIC), "gemm"),
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    return jaxq.load_model(write_tiny(folder, dtype="float16", **sizes))


def _quantized(lm, spec):
    rules = (Rule("*embed*"), Rule("*lm_head*"), Rule("*layers*kernel", spec))
    return lm.quantize(Recipe("mine", (*rules, Rule("*"))))


def _load(folder, to):
    import torch
    from gptqmodel import BACKEND, GPTQModel

    kernel = BACKEND.GPTQ_TORCH if to == "gptq" else BACKEND.AWQ_TORCH
    return GPTQModel.load(
        str(folder), device="cpu", backend=kernel, dtype=torch.float16
    ).model


def _weight(layer, to):
    """What its own kernel multiplies with, ``[in, out]``."""
    if to == "gptq":
        return layer.dequantize_weight().numpy()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size
    ).numpy()


def _compare(model, lm, to):
    """Every weight is ours to the bit, and so are the logits but for float16."""
    import torch

    layers = {n: m for n, m in model.named_modules() if hasattr(m, "qweight")}
    assert len(layers) == 14
    for name, layer in layers.items():
        *_, number, block, module = name.split(".")
        ours = lm.params["params"][f"layers_{number}"][block][module]["kernel"]
        np.testing.assert_array_equal(
            _weight(layer, to), np.asarray(ours.dequantize(jnp.float16))
        )
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.float().numpy()
    params = jax.tree.map(
        lambda a: a.astype(jnp.float32), jaxq.dequantize_params(lm.params)
    )
    ours = np.asarray(lm.forward(params, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(theirs, ours, atol=0.02 * float(ours.std()))


def _layout(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config.get("checkpoint_format") or config["version"]


@pytest.mark.parametrize(
    ("to", "spec", "layout"),
    WRITTEN,
    ids=lambda v: v.format if isinstance(v, QuantSpec) else str(v),
)
def test_gptqmodel_computes_with_the_weights_that_we_write(
    tmp_path, lm, to, spec, layout
):
    small = _quantized(lm, spec)
    assert jaxq.convert(small, tmp_path / "out", to).lossless
    _compare(_load(tmp_path / "out", to), small, to)
    assert _layout(tmp_path / "out") == layout


def test_gptqmodel_reads_zero_points_of_0(tmp_path, lm):
    """Which v1 has not, so that v2 is written."""
    positive = jax.tree.map(jnp.abs, lm.params)
    small = _quantized(
        dataclasses.replace(lm, params=positive), QuantSpec("uint4", 32, **ASYMMETRIC)
    )
    assert jaxq.convert(small, tmp_path / "out", "gptq").lossless
    _compare(_load(tmp_path / "out", "gptq"), small, "gptq")
    assert _layout(tmp_path / "out") == "gptq_v2"
