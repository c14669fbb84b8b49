"""`Encoder`: vectors of texts, and quantizing what makes them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.checkpoints import CheckpointError
from jaxq.encoder import Encoder, Pooling, read_pooling
from jaxq.lm import load_lm, load_model
from jaxq.texts import cut_texts, within
from tests.models.seeded import settings_of, write_seeded
from tests.tiny_lm import byte_tokenizer

TEXTS = ["import os", "a", "for name in os.listdir('.'):", "x" * 300]


def write_bert(folder, case="bert", **modules):
    """Write a tiny BERT whose tokens are bytes, with sentence-transformers' files."""
    config = settings_of(case) | {"vocab_size": 258, "model_type": "bert"}
    config["max_position_embeddings"] = 64
    write_seeded(folder, config)
    (folder / "tokenizer.json").write_text(byte_tokenizer(begin=True).to_str())
    for name, content in modules.items():
        path = folder / {"pooling": "1_Pooling/config.json"}.get(name, f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def module(kind, path=""):
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    return load_model(
        write_bert(
            folder,
            modules=[
                module("Transformer"),
                module("Pooling", "1_Pooling"),
                module("Normalize", "2_Normalize"),
            ],
            pooling={"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
            sentence_bert_config={"max_seq_length": 32, "do_lower_case": False},
        ),
        jnp.float32,
    )


def test_vectors_are_normalized_means_of_the_tokens_states(model):
    assert isinstance(model, Encoder)
    assert model.pooling == Pooling("mean", True, 32, True)
    got = model.encode(TEXTS)
    assert (got.shape, got.dtype) == ((4, 32), np.float32)
    for text, vector in zip(TEXTS, got, strict=True):
        ids = model.tokens_of(text)[:32]
        states = np.asarray(model.forward(model.params, jnp.asarray(ids)[None]))[0]
        mean = states.mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_one_text_is_a_row_and_none_are_no_rows(model):
    np.testing.assert_allclose(model.encode("a"), model.encode(TEXTS)[1], atol=1e-6)
    assert model.encode([]).shape[0] == 0


def test_quantized_vectors_stay_near(model, tmp_path):
    small = model.quantize("w8a8")
    floats = {r.path for r in model.plan("w8a8") if r.rule is None or not r.rule.weight}
    assert not [path for path in floats if path.endswith(("kernel", "embedding"))]
    cosine = (small.encode(TEXTS) * model.encode(TEXTS)).sum(-1)
    assert cosine.min() > 0.999
    assert small.nbytes < model.nbytes / 3
    small.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.pooling == model.pooling
    np.testing.assert_array_equal(again.encode(TEXTS), small.encode(TEXTS))


@pytest.mark.slow
def test_calibrated_recipes_take_texts(model):
    small = model.quantize("w4a16-gptq", calibration=TEXTS * 4, group_size=16)
    rows = [row for row in small.evidence.values() if row["loss"] is not None]
    assert len(rows) == 12
    assert all(row["tokens"] > 100 and row["fallback"] is None for row in rows)
    assert sum(r["loss"] for r in rows) < 0.8 * sum(r["rtn_loss"] for r in rows)


@pytest.mark.parametrize(
    ("modules", "pooling", "said"),
    [
        ([module("Transformer"), module("Dense")], {}, "models.Dense"),
        ([module("Pooling", "1_Pooling")], {"pooling_mode_weightedmean_tokens": True},
         "pools by"),
        ({"type": 1}, {}, "no list"),
    ],
)  # fmt: skip
def test_other_modules_are_refused_by_name(modules, pooling, said, tmp_path):
    write_bert(tmp_path / "odd", modules=modules, pooling=pooling)
    with pytest.raises(CheckpointError, match=said):
        read_pooling(tmp_path / "odd")


def test_heads_and_texts_are_told_apart(model, tmp_path):
    with pytest.raises(ValueError, match="Encoder, which has no next token"):
        load_lm(model.folder)
    with pytest.raises(ValueError, match="perplexity needs a causal language model"):
        jaxq.perplexity(model, "import os" * 50)
    masked = load_model(write_bert(tmp_path / "masked", "masked_bert"), jnp.float32)
    with pytest.raises(ValueError, match="'BertModel'"):
        masked.encode("import os")


# ----------------------------------------------------------------------- calibration


def shorter_and_longer(*lengths, count=40):
    """Texts of some lengths, in no order."""
    rng = np.random.default_rng(0)
    lengths = rng.choice(lengths, count)
    return ["".join(map(chr, rng.integers(97, 123, n))) for n in lengths]


def test_calibration_sees_every_text_as_encode_does_and_no_padding(model):
    texts = shorter_and_longer(3, 14, 20, 29, 60)
    data = model.batched(texts)
    seen = []
    for (tokens, attended), mask in zip(data.batches, data.masks, strict=True):
        assert tokens.shape == attended.shape == mask.shape
        assert tokens.shape[1] in (16, 32)  # the pooling cuts at 32
        rows = np.asarray(mask).any(1)
        # the model attends to what counts; where nothing does, to something
        np.testing.assert_array_equal(attended[rows], mask[rows])
        assert np.asarray(attended).any(1).all()
        seen += [
            tuple(np.asarray(t)[np.asarray(m)].tolist())
            for t, m in zip(tokens[rows], mask[rows], strict=True)
        ]
    want = [tuple(model.tokens_of(text)[:32].tolist()) for text in texts]
    assert sorted(seen) == sorted(want)
    assert data.about["sequences"] == len(texts)
    assert data.about["tokens"] == sum(map(len, want))
    # most of these are longer than 16
    assert data.batches[0][0].shape[1] == 32


def test_calibration_on_padded_texts_is_that_on_single_ones(model):
    """The oracle: one batch per text, as long as it is, without any mask."""
    texts = shorter_and_longer(12, count=20)  # 13 tokens of 16; 20 rows of 32
    small = model.quantize("w4a16-gptq", texts, 16)
    single = [jnp.asarray(model.tokens_of(text)[:32])[None] for text in texts]
    recipe = model.recipe_for("w4a16-gptq", 16)
    want = jaxq.quantize_with_evidence(
        model.params, recipe, model.forward, [model.inputs(ids) for ids in single]
    )
    tokens = sum(ids.size for ids in single)
    assert {row["tokens"] for row in small.evidence.values()} == {0, tokens}
    vectors = small.encode(texts)
    theirs = dataclasses.replace(model, params=want.params).encode(texts)
    rounded = model.quantize("w4a16", group_size=16).encode(texts)
    off = np.abs(vectors - theirs).max()
    assert off < 0.1 * np.abs(rounded - theirs).max()


def test_streaming_masks_padding_too(model, tmp_path):
    texts = shorter_and_longer(3, 20)
    here = model.quantize("w4a16-gptq", texts, 16)
    jaxq.quantize_to(model, tmp_path / "out", "w4a16-gptq", texts, 16)
    there = load_model(tmp_path / "out")
    np.testing.assert_array_equal(there.encode(texts), here.encode(texts))
    assert there.recipe == here.recipe


def test_one_text_is_cut_into_texts(model):
    text = "One, that\ngoes on.\n \nTwo.\n\n\nThree.\n"
    assert cut_texts(text) == ["One, that goes on.", "Two.", "Three."]
    assert cut_texts("One.\n Two. \n") == ["One.", "Two."]
    assert model.batched(text).about == model.batched(cut_texts(text)).about
    with pytest.raises(ValueError, match="holds no text"):
        model.quantize("w4a16-gptq", " \n\n")


def test_no_more_texts_are_taken_than_the_budget_allows():
    sequences = [[1] * 4, [2] * 5, [3]]
    assert within(sequences, 9) == sequences[:2]
    assert within(sequences, 8) == sequences[:1]
    assert within(sequences, 1) == sequences[:1]  # one there must be


def test_arrays_are_taken_as_they_are(model):
    tokens = np.arange(5 * 8).reshape(5, 8)
    data = model.batched(tokens)
    assert data.masks is None
    np.testing.assert_array_equal(np.concatenate([b[0] for b in data.batches]), tokens)


def test_the_plan_says_what_a_preset_means_here(model):
    rows = {row.path: row for row in model.plan("w4a16")}
    assert model.plan("w4a16").recipe.name == "w4a16-encoder"
    kernel = "params/encoder/layer_0/attention/self/{}/kernel".format
    assert rows[kernel("value")].spec.format == "int8"
    assert rows[kernel("query")].spec.format == "uint4"
    assert model.quantize("w4a16").recipe == model.plan("w4a16").recipe
