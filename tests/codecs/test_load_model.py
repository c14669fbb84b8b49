"""Whole quantized models of other libraries, loaded and run."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load as parse

import jaxq
from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.qtensor import is_qtensor

MODELS = Path(__file__).parents[1] / "data" / "models"
NAMES = sorted(path.name for path in MODELS.iterdir())
GPTQ = MODELS / "gptq-v1_b4_g32_asym_zp"


def _float(params):
    """The float32 parameters that a model stands for."""
    dequantized = jaxq.dequantize_params(params)
    return jax.tree.map(lambda a: a.astype(jnp.float32), dequantized)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dequantized_weights(name):
    lm = jaxq.load_model(MODELS / name)
    expected = parse((MODELS / name / "expected.st").read_bytes())
    assert lm.codec == name.partition("-")[0]
    assert not lm.notes
    logits = lm.forward(_float(lm.params), expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits_f32"], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_model_computes_the_same(name):
    lm = jaxq.load_model(MODELS / name, jnp.float32)
    tokens = parse((MODELS / name / "expected.st").read_bytes())["input_ids"]
    float_lm = lm.forward(jaxq.dequantize_params(lm.params), tokens)
    np.testing.assert_allclose(lm.apply(lm.params, tokens), float_lm, atol=1e-4)
    leaves = jax.tree.leaves(lm.params, is_leaf=is_qtensor)
    assert sum(map(is_qtensor, leaves)) >= 7


def test_it_is_saved_as_ours_and_loads_again(tmp_path):
    lm = jaxq.load_model(GPTQ)
    lm.save(tmp_path / "ours")
    again = jaxq.load_model(tmp_path / "ours")
    assert "quantization_config" not in again.files["config.json"]
    for a, b in zip(
        jax.tree.leaves(lm.params), jax.tree.leaves(again.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_gguf_file_is_a_model_too(tmp_path):
    lm = jaxq.load_model(MODELS / "gguf-q4_0" / "model.gguf")
    assert lm.codec == "gguf"
    shutil.copy(MODELS / "gguf-q4_0" / "model.gguf", tmp_path / "a.gguf")
    assert jaxq.load_model(tmp_path).nbytes == lm.nbytes
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF files; name one"):
        jaxq.load_model(tmp_path)


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(GPTQ, tmp_path / "model"))


def _configure(model, **changes):
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_an_unknown_method_is_refused_with_the_known_ones(model):
    _configure(model, quant_method="quip")
    with pytest.raises(UnsupportedError, match=r"'quip'.*gptq.*hqq"):
        jaxq.load_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"qweight' has the shape"),
        ({"group_size": 64}, r"qzeros' has the shape"),
        ({"group_size": 0}, "'group_size' is 0"),
        ({"bits": 5}, "'bits' is 5; it must be 2 or 3 or 4 or 8"),
        ({"bits": True}, "'bits' is True"),
        ({"checkpoint_format": "marlin"}, "'marlin'; gptq and gptq_v2 are read"),
        ({"dynamic": {"-:.*q_proj": {}}}, "says it is not"),
        ({"dynamic": {"(a+)+b": {}}}, "repeats a repetition"),
        ({"quant_method": None}, "'quant_method' is None"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(model, changes, message):
    _configure(model, **changes)
    with pytest.raises(CheckpointError, match=message):
        jaxq.load_model(model)


def test_pickles_are_never_opened(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError, match="pickles only"):
        jaxq.load_model(model)


def test_a_layer_without_its_scales_is_incomplete(model):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="incomplete"):
        jaxq.load_model(model)
