"""Converting between formats: what stays exact, what is refused, what is lost."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import jaxq
from jaxq.checkpoints.errors import (
    CheckpointError,
    ExistsError,
    UnsupportedError,
    WriteError,
)
from jaxq.convert import TARGETS
from jaxq.names import UnknownNameError
from tests.models.seeded import settings_of, write_seeded
from tests.tiny_lm import write_tiny

MODELS = Path(__file__).parent / "data" / "models"
GPTQ = MODELS / "gptq-v1_b4_g32_asym_zp"
AWQ = MODELS / "awq-autoawq_gemm_g32_tied_sharded"
GGUF = MODELS / "gguf-q4_0"
TOKENS = np.arange(24, dtype=np.int32)[None]


def _logits(lm):
    """Float32 logits of the weights that a model stands for."""
    params = jaxq.dequantize_params(lm.params)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    return np.asarray(lm.forward(params, TOKENS))


@pytest.mark.parametrize(
    ("source", "to"),
    [
        (GPTQ, "gptq"),
        (GPTQ, "awq"),
        (GPTQ, "compressed-tensors"),
        (AWQ, "gptq"),
        (AWQ, "jaxq"),
        (GGUF, "gguf"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name.partition("-")[0],
)
def test_what_a_target_expresses_is_the_same_there(tmp_path, source, to):
    done = jaxq.convert(source, tmp_path / "out", to)
    assert done.lossless
    assert done.counts()["exact"] >= 7
    lm, again = jaxq.load_model(source), jaxq.load_model(tmp_path / "out")
    np.testing.assert_array_equal(_logits(lm), _logits(again))
    assert again.codec == (to if to != "jaxq" else "float")


def test_there_and_back_gives_the_same_bytes(tmp_path):
    jaxq.convert(AWQ, tmp_path / "gptq", "gptq")
    jaxq.convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    found = _tensors(tmp_path / "awq")
    expected = _tensors(AWQ)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_a_float_folder_of_what_it_stands_for(tmp_path):
    done = jaxq.convert(GPTQ, tmp_path / "out", "float")
    assert set(done.counts()) == {"float", "kept"}
    again = jaxq.load_model(tmp_path / "out")
    assert not again.is_quantized
    np.testing.assert_array_equal(_logits(again), _logits(jaxq.load_model(GPTQ)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_shards_their_index_and_side_files(tmp_path):
    out = tmp_path / "out"
    jaxq.convert(GPTQ, out, "gptq", shard_bytes=10_000)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert (out / "generation_config.json").read_bytes() == (
        GPTQ / "generation_config.json"
    ).read_bytes()
    with safe_open(out / names[0], "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    np.testing.assert_array_equal(
        _logits(jaxq.load_model(out)), _logits(jaxq.load_model(GPTQ))
    )


@pytest.mark.parametrize("zero", [False, True])
def test_gptq_is_v1_unless_a_zero_point_is_0(tmp_path, lm, zero):
    """Which is known at the last layer only, when other shards are written already."""
    asymmetric = jaxq.QuantSpec("uint4", 32, symmetric=False, scale="bfloat16")
    rules = (
        jaxq.Rule("*layers_1*kernel", asymmetric),
        jaxq.Rule("*layers_0*kernel", jaxq.QuantSpec("int4", 32, scale="bfloat16")),
        jaxq.Rule("*"),
    )
    params = jax.tree.map(lambda a: a, lm.params)
    if zero:
        last = params["params"]["layers_1"]["mlp"]["down_proj"]
        last["kernel"] = jnp.abs(last["kernel"])
    small = dataclasses.replace(lm, params=params).quantize(jaxq.Recipe("mine", rules))
    done = jaxq.convert(small, tmp_path / "out", "gptq", shard_bytes=10_000)
    assert done.lossless
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config = config["quantization_config"]
    assert config["checkpoint_format"] == ("gptq_v2" if zero else "gptq")
    assert ("gptqmodel:0.9.0" in config["meta"]["quantizer"]) is not zero
    stored = _tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.qzeros"]
    assert set(stored.view(np.uint32).flat) == {0x88888888 if zero else 0x77777777}
    again = jaxq.load_model(tmp_path / "out")
    np.testing.assert_array_equal(_logits(small), _logits(again))


def test_what_cannot_be_expressed_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UnsupportedError, match=r"7 weight\(s\)(?s:.)*requantize") as e:
        jaxq.convert(GPTQ, tmp_path / "out", "bitsandbytes")
    assert str(e.value).count("bitsandbytes has nf4") == 1, "each reason once"
    assert "down_proj.weight and 6 more: bitsandbytes has" in str(e.value)
    assert os.listdir(tmp_path) == []


def test_requantizing_says_what_it_cost(tmp_path):
    done = jaxq.convert(GPTQ, tmp_path / "out", "bitsandbytes", requantize=True)
    assert not done.lossless
    rows = [row for row in done.rows if row.outcome == "requantized"]
    assert len(rows) == 7
    before, after = jaxq.load_model(GPTQ), jaxq.load_model(tmp_path / "out")
    w = before.params["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    v = after.params["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    w, v = (np.asarray(q.dequantize(jnp.float32), np.float64) for q in (w, v))
    row = next(row for row in rows if row.name.endswith("0.mlp.up_proj.weight"))
    np.testing.assert_allclose(
        np.linalg.norm(w - v) / np.linalg.norm(w), row.error, rtol=1e-3
    )
    assert 0.02 < row.error < 0.2
    assert "nf4 g64" in row.note
    assert "requantized" in str(done)


@pytest.mark.parametrize(
    ("to", "key"),
    [("compressed-tensors", "ignore"), ("awq", "modules_to_not_convert")],
)
def test_a_tied_head_is_among_what_stays_float(tmp_path, to, key):
    """An engine has a module of that name, and would look for its codes."""
    assert jaxq.convert(AWQ, tmp_path / "out", to).lossless
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["quantization_config"][key] == ["lm_head"]


def test_layers_of_another_class_are_refused_where_no_engine_finds_them(tmp_path):
    """GPT-2's are Conv1D: written as Linear, an engine would draw them at random."""
    lm = jaxq.load_model(write_seeded(tmp_path / "in", settings_of("gpt2")))
    spec = jaxq.QuantSpec("int4", 32, scale="bfloat16")
    small = lm.quantize(jaxq.Recipe("mine", (jaxq.Rule("*h_*kernel", spec),)))
    with pytest.raises(UnsupportedError, match="it is a Conv1D, and compressed"):
        jaxq.convert(small, tmp_path / "out", "compressed-tensors")
    done = jaxq.convert(small, tmp_path / "out", "gptq")
    assert done.lossless
    assert jaxq.load_model(tmp_path / "out").codec == "gptq"


def test_what_was_dequantized_when_it_was_read_is_told(tmp_path):
    """No packed tensor has groups of unequal size, so it arrives as a float."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(GPTQ, tmp_path / "in"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.g_idx"][0] = tensors[f"{name}.g_idx"][-1]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = jaxq.convert(folder, tmp_path / "out", "gptq")
    assert not done.lossless
    (row,) = (row for row in done.rows if row.outcome == "float")
    assert row.name == f"{name}.weight"
    assert "groups of other sizes" in str(done)


def test_what_cannot_be_rounded_anew_stays_float(tmp_path):
    """72 channels are no blocks of 32, of Q8_0 nor of nf4."""
    folder = write_tiny(tmp_path / "in", intermediate_size=72)
    rules = (jaxq.Rule("*layers*kernel", jaxq.QuantSpec("int8")), jaxq.Rule("*"))
    small = jaxq.load_model(folder).quantize(jaxq.Recipe("mine", rules))
    done = jaxq.convert(small, tmp_path / "out", "gguf", requantize=True)
    left = {row.name: row for row in done.rows if row.outcome == "float"}
    assert set(left) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all("no whole blocks of 32" in row.note for row in left.values())
    again = jaxq.load_model(tmp_path / "out").params["params"]["layers_1"]["mlp"]
    kept = small.params["params"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(again["down_proj"]["kernel"], kept.dequantize())
    assert isinstance(again["up_proj"]["kernel"], jaxq.QTensor)


def test_a_float_model_is_to_be_quantized_first(tmp_path):
    jaxq.convert(GPTQ, tmp_path / "float", "float")
    with pytest.raises(UnsupportedError, match="quantize it with a recipe first"):
        jaxq.convert(tmp_path / "float", tmp_path / "out", "gptq", requantize=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "to"),
    [
        (jaxq.QuantSpec("nf4", 64), "bitsandbytes"),
        (jaxq.QuantSpec("int4", 32, scale="bfloat16"), "gptq"),
        (jaxq.QuantSpec("uint4", 32, symmetric=False, scale="float16"), "awq"),
        (jaxq.QuantSpec("fp8_e4m3", (128, 128)), "fp8"),
        (jaxq.QuantSpec("int4", 32, grid="full", scale="float16"), "gguf"),
        (jaxq.QuantSpec("fp8_e4m3", "channel"), "compressed-tensors"),
        (jaxq.QuantSpec("fp4_e2m1", 32, scale="e8m0"), "compressed-tensors"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.format,
)
def test_our_own_models_are_written_exactly(tmp_path, lm, spec, to):
    rules = (
        jaxq.Rule("*embed*"),
        jaxq.Rule("*lm_head*"),
        jaxq.Rule("*layers*kernel", spec),
        jaxq.Rule("*"),
    )
    lm = lm.quantize(jaxq.Recipe("mine", rules))
    done = jaxq.convert(lm, tmp_path / "out", to)
    assert done.lossless
    again = jaxq.load_model(tmp_path / "out")
    for path in (("mlp", "up_proj"), ("self_attn", "q_proj")):
        one, other = (
            model.params["params"]["layers_0"][path[0]][path[1]]["kernel"]
            for model in (lm, again)
        )
        np.testing.assert_array_equal(
            one.dequantize(jnp.float32), other.dequantize(jnp.float32)
        )


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory):
    """Models with input scales, by key heads: one per query head, and shared."""
    rng, found = np.random.default_rng(0), {}
    for heads in (4, 2):
        folder = tmp_path_factory.mktemp("tiny") / "model"
        lm = jaxq.load_model(write_tiny(folder, num_key_value_heads=heads))
        text = rng.integers(0, lm.config.vocab_size, (4, 32)).astype(np.int32)
        found[heads] = lm.quantize("w8a8-smoothquant", calibration=text)
    return found


def test_input_scales_are_folded_into_what_computes_the_input(tmp_path, smoothed):
    small = smoothed[4]
    kernel = small.params["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.input_scale is not None
    done = jaxq.convert(small, tmp_path / "out", "compressed-tensors")
    assert done.counts()["exact"] > 0
    again = jaxq.load_model(tmp_path / "out", jnp.float32)
    kernel = again.params["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.input_scale is None
    plain = jaxq.dequantize_params
    one = small.forward(plain(small.params), TOKENS)
    other = again.forward(plain(again.params), TOKENS)
    np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.std(one)))


def test_a_folded_function_that_changed_is_noticed(tmp_path, smoothed, monkeypatch):
    """Two channels of one norm of one layer, exchanged."""
    fold_edge = jaxq.fold._fold_edge

    def wrong(layer, edge, name):
        fold_edge(layer, edge, name)
        if name == "layers_1" and edge.kind == "norm":
            norm = layer[edge.producer[0]]
            norm["weight"] = (
                jnp.asarray(norm["weight"])
                .at[:2]
                .set(jnp.asarray(norm["weight"])[1::-1])
            )

    monkeypatch.setattr(jaxq.fold, "_fold_edge", wrong)
    with pytest.raises(UnsupportedError, match="folding the input scales moved"):
        jaxq.convert(smoothed[4], tmp_path / "out", "compressed-tensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["compressed-tensors", "float", "gptq"])
def test_a_saved_model_is_converted_as_the_one_in_memory(tmp_path, smoothed, lm, to):
    """Which is never whole in memory, and is folded layer by layer."""
    spec = jaxq.QuantSpec("int4", 32, scale="bfloat16")
    plain = lm.quantize(jaxq.Recipe("mine", (jaxq.Rule("*layers*kernel", spec),)))
    small = plain if to == "gptq" else smoothed[4]
    jaxq.convert(small, tmp_path / "memory", to)
    small.save(tmp_path / "saved")
    told = jaxq.convert(tmp_path / "saved", tmp_path / "folder", to)
    assert told.source == "jaxq"
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("memory", "folder")
    )
    assert one == other
    with (tmp_path / "saved" / "model.safetensors").open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match="was altered"):
        jaxq.convert(tmp_path / "saved", tmp_path / "again", to)


def test_scales_that_cannot_be_folded_are_refused_or_taken_in(tmp_path, smoothed):
    small = smoothed[2]
    with pytest.raises(UnsupportedError, match="attention repeats heads"):
        jaxq.convert(small, tmp_path / "out", "compressed-tensors")
    done = jaxq.convert(small, tmp_path / "out", "compressed-tensors", requantize=True)
    again = [row.name for row in done.rows if row.outcome == "requantized"]
    assert again == [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]
    assert all(row.error < 0.02 for row in done.rows)


def test_an_old_model_survives_a_failed_conversion(tmp_path):
    out = tmp_path / "out"
    jaxq.convert(GPTQ, out, "gptq")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ExistsError, match="exists"):
        jaxq.convert(AWQ, out, "awq")
    with pytest.raises(UnsupportedError):
        jaxq.convert(GPTQ, out, "bitsandbytes", overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    jaxq.convert(AWQ, out, "awq", overwrite=True)
    assert jaxq.load_model(out).codec == "awq"
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ExistsError, match=r"thesis\.txt"):
        jaxq.convert(AWQ, out, "awq", overwrite=True)


def test_a_checkpoint_of_our_own_is_replaced_too(tmp_path):
    out = tmp_path / "model"
    jaxq.convert(AWQ, out, "jaxq")
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ExistsError, match=r"thesis\.txt"):
        jaxq.convert(AWQ, out, "awq", overwrite=True)
    (out / "thesis.txt").unlink()
    jaxq.convert(AWQ, out, "awq", overwrite=True)
    assert jaxq.load_model(out).codec == "awq"


@contextlib.contextmanager
def _full_disk(room):
    """No file may be longer than so many bytes, whoever writes it."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A model that was there before."""
    return jaxq.convert(GPTQ, tmp_path_factory.mktemp("old") / "out", "gptq").path


@pytest.mark.parametrize("room", [0, 1_000, 30_000])
@pytest.mark.parametrize("to", [to for to in TARGETS if to != "jaxq"])
def test_a_full_disk_leaves_the_old_model(tmp_path, old, to, room):
    out = Path(shutil.copytree(old, tmp_path / "out"))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with _full_disk(room), pytest.raises(WriteError, match="is untouched"):
        jaxq.convert(GPTQ, out, to, requantize=True, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("to", ["gptq", "gguf", "jaxq"])
def test_a_disk_that_cannot_be_written_leaves_the_old_model(
    tmp_path, old, monkeypatch, to
):
    out = Path(shutil.copytree(old, tmp_path / "out"))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    if to == "jaxq":
        out = tmp_path / "new"

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(WriteError, match="Read-only file system"):
        jaxq.convert(GPTQ, out, to, requantize=True, overwrite=True)
    kept = tmp_path / "out"
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_conversion_leaves_nothing_of_that_name(tmp_path):
    """And is no obstacle to the next."""
    code = (
        "import os, signal, sys\n"
        "from jaxq.checkpoints import atomic\n"
        "from jaxq.cli import main\n"
        "atomic.sync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.argv = ['jaxq', *sys.argv[1:]]\n"
        "main()\n"
    )
    words = ["convert", str(GPTQ), str(tmp_path / "out"), "--to", "awq"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    (left,) = os.listdir(tmp_path)
    assert re.fullmatch(r"\.out\.\d+-[0-9a-f]{8}\.partial", left)
    assert (tmp_path / left / "model.safetensors").is_file(), "it was killed late"
    assert jaxq.convert(GPTQ, tmp_path / "out", "awq").lossless
    jaxq.convert(GPTQ, tmp_path / "whole", "awq")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_unknown_target_gets_a_suggestion(tmp_path):
    with pytest.raises(UnknownNameError, match="gptq"):
        jaxq.convert(GPTQ, tmp_path / "out", "gtpq")
    assert {"jaxq", "float", "gptq", "awq", "gguf"} <= TARGETS.keys()


def _tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return jaxq.load_model(write_tiny(folder, dtype="bfloat16"))
