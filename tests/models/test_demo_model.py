"""The model that comes with jaxq: complete, small, and as good as its page says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.huggingface import load_huggingface

FOLDER = Path(__file__).parents[2] / "jaxq" / "demo_model"


@pytest.fixture(scope="module")
def demo():
    return load_huggingface(FOLDER, jnp.float32)


def windows(model, count):
    ids = np.array(model.tokenizer.encode((FOLDER / "eval.txt").read_text("utf-8")).ids)
    context = model.config.context
    spread = np.linspace(0, len(ids) - context - 1, count).astype(int)
    return jnp.asarray(np.stack([ids[i : i + context + 1] for i in spread]), jnp.int32)


def nats(model, batch):
    logits = jax.jit(model.module.apply)(model.params, batch[:, :-1])
    chances = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(chances, batch[:, 1:, None], axis=-1)
    return -float(picked.mean())


def test_it_is_a_plain_hugging_face_folder(demo):
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"PROVENANCE.md", "PSF-LICENSE.txt", "generation_config.json"} <= names
    assert demo.family.name == "llama"
    assert demo.eos == (demo.tokenizer.token_to_id("<|endoftext|>"),)


def test_it_is_small_enough_for_the_wheel():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 12_000_000
    assert sizes["eval.txt"] < 300_000
    assert sizes["calibration.txt"] < 300_000


def test_the_held_out_text_is_as_likely_as_the_page_says(demo):
    page = (FOLDER / "PROVENANCE.md").read_text("utf-8")
    stated = float(re.search(r"nats per token \| ([\d.]+)", page)[1])
    # Sixteen of 170 windows; windows differ by about 0.4 nats, so their mean by 0.1.
    assert nats(demo, windows(demo, 16)) == pytest.approx(stated, abs=0.4)


def test_the_evaluation_text_is_not_the_calibration_text():
    held_out = (FOLDER / "eval.txt").read_text("utf-8")
    seen = set((FOLDER / "calibration.txt").read_text("utf-8").splitlines())
    long = [line for line in held_out.splitlines() if len(line) > 60]
    shared = sum(line in seen for line in long)
    assert shared < 0.01 * len(long)


def test_any_text_survives_the_tokenizer(demo):
    text = "Grüße, 世界! \t\x00 `:mod:` 😀\n"
    assert demo.tokenizer.decode(demo.tokenizer.encode(text).ids) == text


@pytest.mark.compare
def test_transformers_reads_the_same_tokens(demo):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(FOLDER)
    text = (FOLDER / "eval.txt").read_text("utf-8")[:20_000]
    assert theirs(text)["input_ids"] == demo.tokenizer.encode(text).ids


@pytest.mark.torch
def test_transformers_computes_the_same_logits(demo):
    from tests.models.make_golden import logits_of

    tokens = np.asarray(windows(demo, 1)[:, :-1])
    expected = logits_of(FOLDER, tokens)
    logits = jax.jit(demo.module.apply)(demo.params, jnp.asarray(tokens))
    # Logits of order 10, sums of 768 terms through six layers in float32.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
