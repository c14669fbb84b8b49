"""Mixtures of experts in GGUF: stacked matrices, bit for bit; old and damaged files."""

import jax
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, Recipe, Rule
from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.gguf import open_gguf
from jaxq.codecs.gguf_file import read_file
from tests.codecs.gguf_models import read_raw, rewrite, write_model
from tests.codecs.test_fuzz import damage_bytes, read_gguf, survives

FOUR = QuantSpec("int4", 32, grid="full", scale="float16")
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _leaves(lm):
    found, _ = jax.tree_util.tree_flatten_with_path(lm.params)
    return {jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in found}


def _same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for where, leaf in ours.items():
        exact = "norm" not in where
        np.testing.assert_allclose(leaf, theirs[where], atol=0 if exact else 2**-23)


def test_codes_of_experts_are_kept_bit_for_bit(tmp_path):
    lm, _ = write_model(tmp_path, "qwen2_moe", num_experts=3)
    small = lm.quantize(Recipe("mine", (Rule("*experts*", FOUR), Rule("*"))))
    assert jaxq.convert(small, tmp_path / "out", "gguf-q4_0").lossless
    path = tmp_path / "out" / "model.gguf"
    _, tensors = read_raw(path)
    assert tensors["blk.0.ffn_down_exps.weight"][:2] == (2, (3, 64, 32))
    assert tensors["blk.0.ffn_gate_inp_shexp.weight"][:2] == (0, (64,))
    _same(_leaves(jaxq.load_model(path)), _leaves(small))
    # tensor by tensor, from the file
    assert jaxq.convert(path, tmp_path / "third", "gguf-q4_0").lossless
    assert read_raw(tmp_path / "third" / "model.gguf")[1] == tensors


def test_experts_with_tensors_of_their_own_are_read(tmp_path):
    """As llama.cpp wrote Mixtral before it stacked them."""
    lm, path = write_model(tmp_path, "mixtral")
    values, tensors = read_raw(path)
    split = {}
    for name, (kind, shape, data) in tensors.items():
        if len(shape) != 3:
            split[name] = kind, shape, data
            continue
        size = len(data) // shape[0]
        for i in range(shape[0]):
            alone = name.replace("_exps.", f".{i}.")
            split[alone] = kind, shape[1:], data[i * size : (i + 1) * size]
    rewrite(path, values, split)
    assert "blk.0.ffn_gate.3.weight" in read_raw(path)[1]
    _same(_leaves(jaxq.load_model(path)), _leaves(lm))


def test_stacked_mxfp4_is_read(tmp_path):
    _, path = write_model(tmp_path, "qwen3_moe")
    values, tensors = read_raw(path)
    rng = np.random.default_rng(0)
    name = "blk.1.ffn_up_exps.weight"
    raw = rng.integers(0, 256, (4, 32, 2, 17), np.uint8)
    raw[..., 0] = rng.integers(120, 130, (4, 32, 2))
    rewrite(path, values, {**tensors, name: (39, (4, 32, 64), raw.tobytes())})
    lm = jaxq.load_model(path)
    weight = lm.params["params"]["layers_1"]["mlp"]["experts"]["up_proj"]
    assert isinstance(weight, jaxq.QTensor)
    codes = np.concatenate([raw[..., 1:] & 15, raw[..., 1:] >> 4], -1)
    numbers = E2M1[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    numbers = numbers * np.exp2(raw[..., :1].astype(np.float32) - 127)
    wanted = numbers.reshape(4, 32, 64).swapaxes(1, 2)
    np.testing.assert_array_equal(weight.dequantize(), wanted)


def test_sizes_of_experts_have_llama_cpps_defaults(tmp_path):
    """Old files of Qwen1.5-MoE do not say how wide an expert is."""
    lm, path = write_model(tmp_path, "qwen2_moe", intermediate_size=64)
    values, tensors = read_raw(path)
    key = "qwen2moe.expert_feed_forward_length"
    assert values[key] == 32
    assert lm.config.per_token == 2
    rewrite(path, {**values, key: None}, tensors)
    assert jaxq.load_model(path).config == lm.config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"expert_count": 5}, CheckpointError, r"\(4, 64, 32\), which are no 5 matr"),
        ({"expert_count": 2**30}, CheckpointError, "no model has more than 10000"),
        ({"expert_count": None}, CheckpointError, "expert_count is 'None'"),
        ({"expert_weights_scale": 2.5}, UnsupportedError, "weights_scale is '2.5'"),
        ({"expert_gating_func": 2}, UnsupportedError, "gating_func is '2'.*softmax"),
    ],
)
def test_other_experts_are_refused(tmp_path, changes, error, message):
    _, path = write_model(tmp_path, "qwen3_moe")
    values, tensors = read_raw(path)
    more = {f"qwen3moe.{key}": value for key, value in changes.items()}
    rewrite(path, {**values, **more}, tensors)
    with pytest.raises(error, match=message):
        open_gguf(path)


def test_an_expert_may_not_be_there_twice(tmp_path):
    _, path = write_model(tmp_path, "mixtral")
    values, tensors = read_raw(path)
    one = (0, (128, 64), bytes(4 * 128 * 64))
    rewrite(path, values, {**tensors, "blk.0.ffn_gate.3.weight": one})
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1\.weight' twice"):
        open_gguf(path)


def test_damaged_files_of_experts_are_refused_cleanly(tmp_path):
    rng = np.random.default_rng(7)
    _, path = write_model(tmp_path, "qwen2_moe")
    data, tensors = path.read_bytes(), read_file(path).tensors
    start, clean = min(tensor.start for tensor in tensors.values()), 0
    with np.errstate(all="ignore"):
        for _ in range(200):
            path.write_bytes(damage_bytes(rng, data, start))
            clean += survives(lambda: read_gguf(path))
    assert clean < 200
