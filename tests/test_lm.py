"""`LM`: loading, generating, quantizing and saving whole models."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.lm import DEMO_FOLDER, generate, load_model
from jaxq.pipeline import dequantize_params
from jaxq.qtensor import is_qtensor
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from pallas_kernels.target import Target
from tests.tiny_lm import TEXT, write_tiny

TOKENS = jnp.arange(2 * 16, dtype=jnp.int32).reshape(2, 16)
STATIC = Recipe(
    "static",
    (
        Rule(
            "*_proj*",
            QuantSpec("int8"),
            QuantSpec("int8", "tensor"),
            static=True,
        ),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("lm") / "tiny")


@pytest.fixture(scope="module")
def lm(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def small(lm):
    return lm.quantize("w4a16")


def test_quantizes_into_the_layout_of_this_machines_kernels(
    lm, small, tmp_path, monkeypatch
):
    """As on a TPU: its layout, its kernels, its numbers, and the same files."""
    tpu = Target("tpu", "v5e", interpret=True)
    monkeypatch.setattr(Target, "here", classmethod(lambda cls: tpu))
    there = lm.quantize("w4a16")
    leaves = jax.tree.leaves(there.params, is_leaf=is_qtensor)
    layouts = [leaf.layout for leaf in leaves if is_qtensor(leaf)]
    assert layouts.count("tpu") >= 7
    tokens = jnp.arange(8)[None] + 3
    rows = jaxq.explain(lm.forward, there.params, tokens)
    kernels = [row.choice.kernel for row in rows if row.choice]
    assert kernels.count("tpu.weight_only_decode") >= 7
    # the kernel multiplies as bfloat16 what the CPU multiplies as float32
    expected = small.apply(small.params, tokens)
    close = np.max(np.abs(expected)) * 2.0**-6
    np.testing.assert_allclose(there.apply(there.params, tokens), expected, atol=close)
    for model, name in ((small, "here"), (there, "there")):
        model.save(tmp_path / name)
    files = [sorted((tmp_path / n).glob("*.safetensors")) for n in ("here", "there")]
    assert files[0]
    for a, b in zip(*files, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_loads_a_float_folder(lm):
    assert lm.name == "tiny"
    assert not lm.is_quantized
    assert lm.bits_per_weight == 32
    assert lm.eos == (256,)
    logits = lm.apply(lm.params, TOKENS)
    assert (logits.shape, logits.dtype) == ((2, 16, 258), jnp.float32)
    exact = lm.forward(lm.params, TOKENS)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    assert repr(lm).startswith("LM(tiny, ")


def test_encode_and_decode_are_inverse(lm):
    assert lm.encode("é: x").tolist() == lm.tokenizer.encode("é: x").ids
    assert lm.decode(lm.encode("é: x")) == "é: x"


def test_quantized_parameters_compute_what_they_read_back(lm, small):
    assert small.is_quantized
    assert small.recipe.name == "w4a16"
    assert not lm.is_quantized  # the other one is untouched
    assert any(map(is_qtensor, jax.tree.leaves(small.params, is_leaf=is_qtensor)))
    close = lm.forward(dequantize_params(small.params), TOKENS)
    logits = small.apply(small.params, TOKENS)
    np.testing.assert_allclose(logits, close, rtol=1e-4, atol=1e-3)
    assert float(jnp.abs(logits - lm.apply(lm.params, TOKENS)).max()) > 0.01


def test_group_size_is_passed_on(lm):
    finer = lm.quantize("w4a16", group_size=32)
    assert finer.recipe.name == "w4a16-g32"
    assert finer.nbytes > lm.quantize("w4a16").nbytes


def test_saved_models_load_as_they_were(small, tmp_path):
    small.save(tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert again.recipe == small.recipe
    assert again.files == small.files
    assert jax.tree.structure(again.params) == jax.tree.structure(small.params)
    for a, b in zip(
        jax.tree.leaves(again.params), jax.tree.leaves(small.params), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert again.generate("import ", 8) == small.generate("import ", 8)


def test_saving_does_not_replace_unasked(small, tmp_path):
    small.save(tmp_path / "small")
    with pytest.raises(FileExistsError):
        small.save(tmp_path / "small")
    small.save(tmp_path / "small", overwrite=True)


def test_generate_is_the_likeliest_continuation(lm):
    text = lm.generate("import os", 6)
    tokens = lm.encode("import os").tolist()
    for _ in range(6):
        logits = lm.forward(lm.params, jnp.asarray([tokens], jnp.int32))
        tokens.append(int(logits[0, -1].argmax()))
    assert text == lm.decode(tokens[9:])
    assert generate(lm, "import os", 6) == text


def test_streamed_pieces_are_whole_characters(lm, monkeypatch):
    """Bytes of one character arrive one by one; the pieces are never half of it."""
    made = lm.encode("aé漢b").tolist()
    tokens = (np.asarray([t], np.int32) for t in made)
    module = importlib.import_module("jaxq.generation")
    monkeypatch.setattr(module, "stream", lambda *a, **k: tokens)
    assert [p for p in lm.stream("x") if p] == ["a", "é", "漢", "b"]


def test_sampling_depends_on_the_seed_alone(lm):
    draw = [lm.generate("x", 12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_an_empty_prompt_begins_with_the_end_of_text(lm):
    assert lm.generate("", 4) == lm.generate("<end>", 4)


def test_generate_names_the_context(lm):
    with pytest.raises(ValueError, match="context of 64"):
        lm.generate("import os", 60)


def test_static_scales_need_data(lm):
    with pytest.raises(ValueError, match="needs data for its static activation"):
        lm.quantize(STATIC)
    quantized = lm.quantize(STATIC, calibration=TEXT)
    assert quantized.apply(quantized.params, TOKENS).shape == (2, 16, 258)


@pytest.mark.parametrize(
    ("calibration", "shape"),
    [
        (TEXT, (len(TEXT) // 64, 64)),
        ([TEXT, "more"], ((len(TEXT) + 4) // 64, 64)),
        ("short", (1, 5)),
        (np.zeros((3, 7), np.int64), (3, 7)),
        (jnp.ones((2, 9), jnp.int32), (2, 9)),
    ],
)
def test_calibration_tokens(lm, calibration, shape):
    tokens = lm.calibration_tokens(calibration)
    assert (tokens.shape, tokens.dtype) == (shape, np.int32)


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ("", "give a longer text"),
        ([], "give a longer text"),
        (np.zeros((2, 3), np.float32), r"float32\[2, 3\]: give a text"),
        (np.zeros(3, np.int32), r"int32\[3\]: give a text"),
        (np.full((1, 4), 258), "token 258.*knows 0 to 257"),
        (np.full((1, 4), -1), "token -1"),
        (np.zeros((1, 65), np.int32), "65 tokens, and the model reads at most 64"),
    ],
)
def test_refuses_calibration(lm, calibration, said):
    with pytest.raises(ValueError, match=said):
        lm.calibration_tokens(calibration)


@pytest.mark.parametrize(
    ("calibration", "name"),
    [
        ({"input_ids": np.ones((2, 8), np.int32)}, "dict"),
        ([np.ones(8, np.int32)], "ndarray"),
        ([TEXT, b"bytes"], "bytes"),
        (b"bytes", "bytes"),
        (3, "int"),
    ],
)
def test_refuses_what_is_no_calibration(lm, calibration, name):
    with pytest.raises(TypeError, match=f"calibration holds {name}: give a text"):
        lm.calibration_tokens(calibration)


def test_plan_reads_no_weights(folder, lm, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    abstract = load_model(bare, weights=False)
    planned = abstract.plan("w4a16")
    assert planned.bytes_after == lm.quantize("w4a16").nbytes
    assert planned.bytes_before == lm.nbytes


def test_a_model_without_tokenizer_says_so(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    lm = load_model(bare)
    assert lm.apply(lm.params, TOKENS).shape == (2, 16, 258)
    with pytest.raises(ValueError, match=r"bare has no tokenizer.*tokenizer\.json"):
        lm.generate("x")


def test_several_ends_of_text(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    ends = {"eos_token_id": [7, 9]}
    (copy / "generation_config.json").write_text(json.dumps(ends))
    assert load_model(copy).eos == (7, 9)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.skipif(not DEMO_FOLDER.joinpath("config.json").is_file(), reason="no demo")
def test_the_word_demo_is_the_embedded_model():
    lm = load_model("demo")
    assert lm.name == "demo"
    assert lm.generate("import ", 4)
