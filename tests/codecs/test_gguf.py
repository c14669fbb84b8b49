"""GGUF: every block type against ggml's C code; damaged files."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxq
from jaxq.checkpoints.errors import CheckpointError, CorruptError, UnsupportedError
from jaxq.codecs.gguf import open_gguf
from jaxq.codecs.gguf_architectures import ARCHITECTURES
from jaxq.codecs.gguf_blocks import TYPES
from jaxq.codecs.gguf_file import read_file
from jaxq.codecs.gguf_rows import row_order
from jaxq.codecs.gguf_write import GGUFSink
from jaxq.codecs.source import fill
from tests.codecs.excerpts import digest, write_gguf
from tests.codecs.gguf_models import FAMILIES, config_of, read_raw, rewrite, write_model

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "gguf" / "blocks.gguf"
DIGESTS = json.loads((DATA / "gguf" / "blocks.json").read_text())
MODEL = DATA / "models" / "gguf-q4_0" / "model.gguf"


def _blocks(name):
    file = read_file(FILE)
    tensor = file.tensors[name]
    kind = TYPES[tensor.type]
    rows, columns = tensor.shape
    out = np.empty((rows, columns // kind.elements, kind.nbytes), np.uint8)
    fill(file.path, file.size, tensor.start, out)
    return kind, out


@pytest.mark.parametrize("name", DIGESTS)
def test_a_block_type_is_ggmls(name):
    kind, raw = _blocks(name)
    values = np.asarray(kind.decode(raw).tensor().dequantize()).T
    assert digest(values) == DIGESTS[name]


def test_every_type_of_the_table_is_tested():
    assert {_blocks(name)[0].name for name in DIGESTS} == {
        kind.name for kind in TYPES.values()
    }


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_encoding_gives_back_the_bytes(name):
    kind, raw = _blocks(name)
    np.testing.assert_array_equal(kind.encode(kind.decode(raw)), raw)


def test_a_written_file_is_read_back(tmp_path):
    values = {"general.architecture": "none", "n": 7, "x": 0.5, "yes": True}
    tensors = {"a": (0, (2, 3), np.arange(6, dtype="<f4").tobytes())}
    write_gguf(tmp_path / "a.gguf", values, tensors)
    file = read_file(tmp_path / "a.gguf")
    assert file.values == values
    assert file.tensors["a"].shape == (2, 3)
    out = np.empty((2, 3), "<f4")
    fill(file.path, file.size, file.tensors["a"].start, out)
    assert out.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_config_is_that_of_the_model():
    _, config = open_gguf(MODEL)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_key_value_heads"]) == (64, 2)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("keep", [0, 3, 20, 23, 100, 2000, 20000])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "model.gguf"
    path.write_bytes(MODEL.read_bytes()[:keep])
    with pytest.raises(CorruptError):
        read_file(path)


def test_absurd_counts_are_refused_before_anything_is_made(tmp_path):
    data = bytearray(MODEL.read_bytes())
    data[8:16] = (2**60).to_bytes(8, "little")
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="1152921504606846976 tensors"):
        read_file(path)


def test_overlapping_tensors_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    four = np.zeros(64, "<f4").tobytes()
    write_gguf(path, {}, {"a": (0, (64,), four), "b": (0, (64,), four)})
    data = path.read_bytes()
    second = b"b" + struct.pack("<IQIQ", 1, 64, 0, 256)
    assert second in data
    path.write_bytes(data.replace(second, second[:-8] + struct.pack("<Q", 32)))
    with pytest.raises(CorruptError, match="there is room from"):
        read_file(path)


def test_unknown_architectures_and_types_are_named(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": "mamba"}, {})
    with pytest.raises(UnsupportedError, match=r"mamba.*llama, qwen2, qwen3, "):
        open_gguf(path)
    write_gguf(path, {}, {"a": (19, (256,), bytes(50))})
    with pytest.raises(UnsupportedError, match=r"ggml type 19.*Q4_K"):
        read_file(path)


def test_a_scaled_rope_needs_the_models_own_config(tmp_path):
    file = read_file(MODEL)
    path = tmp_path / "a.gguf"
    values = {**file.values, "llama.rope.scaling.type": "yarn"}
    table = (0, (8, 4), bytes(128))
    write_gguf(path, values, {"token_embd.weight": table})
    with pytest.raises(UnsupportedError, match=r"config\.json"):
        open_gguf(path)
    given = {"model_type": "llama"}
    assert open_gguf(path, given)[1] == given
    write_gguf(path, {**values, "llama.block_count": 0.5}, {})
    with pytest.raises(CheckpointError, match="block_count"):
        open_gguf(path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_says_all_of_a_model(tmp_path, model_type):
    lm, path = write_model(tmp_path, model_type)
    again = jaxq.load_model(path)
    layout = {"grouped": True} if model_type == "falcon" else {}
    assert again.config == dataclasses.replace(lm.config, **layout)
    found, _ = jax.tree_util.tree_flatten_with_path(again.params)
    for (where, a), b in zip(found, jax.tree.leaves(lm.params), strict=True):
        exact = "norm" not in jax.tree_util.keystr(where)
        np.testing.assert_allclose(a, b, atol=0 if exact else 2**-23)


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("gemma3_text", ("rope_theta", "head_dim", "query_pre_attn_scalar")),
        ("gemma2", ("sliding_window", "head_dim", "query_pre_attn_scalar")),
        ("qwen3", ("head_dim",)),
    ],
)
def test_what_a_config_leaves_out_is_written_as_the_model_has_it(
    tmp_path, monkeypatch, model_type, missing
):
    name, more = FAMILIES[model_type]
    less = {key: value for key, value in more.items() if key not in missing}
    monkeypatch.setitem(FAMILIES, model_type, (name, less))
    lm, path = write_model(tmp_path, model_type)
    assert not json.loads(lm.files["config.json"]).keys() & set(missing)
    assert jaxq.load_model(path).config == lm.config


def test_a_window_of_0_is_none(tmp_path):
    """So llama.cpp's converter writes Phi-4, which is a phi3 that sees everything."""
    _, path = write_model(tmp_path, "phi3", sliding_window=None)
    assert read_file(path).values["phi3.attention.sliding_window"] == 0
    assert jaxq.load_model(path).config.windows == ()


def test_another_pooling_needs_the_models_own_folder(tmp_path):
    lm, path = write_model(tmp_path, "bert")
    values, tensors = read_raw(path)
    rewrite(path, {**values, "bert.pooling_type": 2}, tensors)
    with pytest.raises(UnsupportedError, match=r"pooling_type is '2'.*modules\.json"):
        open_gguf(path)
    (path.parent / "config.json").write_text(lm.files["config.json"])
    assert jaxq.load_model(path).config == lm.config


def test_norms_of_gemma_are_shifted(tmp_path):
    lm, path = write_model(tmp_path, "gemma2")
    file = read_file(path)
    out = np.empty(64, "<f4")
    fill(file.path, file.size, file.tensors["output_norm.weight"].start, out)
    np.testing.assert_array_equal(
        out, 1 + np.asarray(lm.params["params"]["norm"]["weight"])
    )


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 256}, "takes 24.*it is 256"),
        ("gemma2", {"sliding_window": None}, "that sliding_window is null"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_soft.* is null"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "no final_logit_softcap"),
        ("gemma3_text", {"rope_local_base_freq": 50.0}, "which layers slide"),
        ("gemma3_text", {"sliding_window_pattern": 3}, "which layers slide"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "angles scaled as 'linear'",
        ),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu.* with silu"),
        ("qwen2", {"use_sliding_window": True}, r"windows is \(None, 8\).* with \(\)"),
        ("mistral", {"sliding_window": 8}, r"windows is \(8, 8\).*llama model with"),
        ("qwen2_moe", {"norm_topk_prob": True}, "normalized is True.* with False"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "head in every qwen2moe file"),
        ("qwen3_moe", {"norm_topk_prob": False}, "normalized is False.* with True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"no name for 'model.layers.1.mlp.d"),
        (
            "gpt2",
            {"activation_function": "gelu"},
            "activation is gelu: .* with gelu_new",
        ),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, "activation is gelu_fast"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is False"),
        ("gpt_neox", {"tie_word_embeddings": True}, "head in every gptneox file"),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "add_to_normed is True",
        ),
        ("bert", {"hidden_act": "relu"}, "activation is relu: .* with gelu"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "no name for 'cls.predict"),
        ("t5", {"tie_word_embeddings": True}, "head in every t5 file"),
        ("t5", {"relative_attention_max_distance": 64}, "reach is 64: .* with 128"),
        ("falcon", {"alibi": True}, "alibi is True"),
        ("falcon", {"bias": True}, "bias is True"),
        ("falcon", {"parallel_attn": False}, "no name for.*post_attention_layernorm"),
        ("opt", {}, "written for .*llama.*not for 'opt'"),
    ],
)
def test_what_no_file_can_say_is_refused(tmp_path, model_type, changes, message):
    with pytest.raises(UnsupportedError, match=message):
        GGUFSink(tmp_path, config_of(model_type, **changes), 8)


def test_the_digest_is_of_the_numbers():
    """Both zeros count as one, anything else does not."""
    a = np.asarray([0.0, 1.0], np.float32)
    assert digest(a) == digest(-a * np.asarray([1, -1], np.float32))
    assert digest(a) == hashlib.sha256(a.tobytes()).hexdigest()


def _row_of(gguf, sign=None):
    return next(r for r in ARCHITECTURES if (r.gguf, r.sign) == (gguf, sign))


def test_rows_of_fused_projections_lie_apart():
    """Falcon has queries, key and value of each key head together; GGUF does not."""
    theirs = [(g, part, i) for g in "ab" for part in "qqkv" for i in range(3)]
    order = row_order(
        _row_of("falcon"), "transformer.h.0.self_attention.query_key_value", 24, (4, 2)
    )
    wanted = [(g, part, i) for part in "qkv" for g in "ab" for i in range(3)]
    doubled = [row for row in wanted if row[1] == "q"]
    moved = [theirs[i] for i in order]
    assert sorted(moved[:12]) == sorted(2 * doubled)
    assert [g for g, _, _ in moved[:12]] == list("aaaaaabbbbbb")
    assert moved[12:] == wanted[6:]


def test_rotary_halves_of_llama_lie_by_turns():
    row, name = _row_of("llama"), "model.layers.0.self_attn.k_proj"
    order = row_order(row, name, 12, (4, 2))
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert row_order(_row_of("qwen2"), name, 12, (4, 2)) is None
    with pytest.raises(CheckpointError, match=r"k_proj' has 10 rows.* 2 heads"):
        row_order(row, name, 10, (4, 2))
