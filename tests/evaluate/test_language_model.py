"""Perplexity of a whole model on a text, against NumPy on its logits."""

import dataclasses

import numpy as np
import pytest

from jaxq.evaluate import batch_size, evaluate_text, perplexity, text_windows
from jaxq.lm import load_model
from tests.tiny_lm import TEXT, write_tiny


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_model(write_tiny(tmp_path_factory.mktemp("lm") / "tiny"))


def test_perplexity_is_that_of_disjoint_windows(lm):
    tokens = lm.encode(TEXT)
    window = 48
    losses = []
    for start in range(0, len(tokens) - window + 1, window):
        part = tokens[start : start + window]
        logits = np.asarray(lm.apply(lm.params, part[None]), np.float64)[0, :-1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-log_p[np.arange(window - 1), part[1:]])
    expected = np.exp(np.mean(losses))
    np.testing.assert_allclose(perplexity(lm, TEXT, window=window), expected, rtol=1e-5)


def test_the_window_is_the_context(lm):
    assert text_windows(lm, TEXT).shape[1] == 64
    longer = dataclasses.replace(lm.config, context=4096)
    longer_lm = dataclasses.replace(lm, config=longer)
    assert text_windows(longer_lm, TEXT * 6).shape[1] == 2048


def test_special_tokens_come_once(tmp_path):
    lm = load_model(write_tiny(tmp_path / "tiny", begin=True))
    windows = text_windows(lm, TEXT)
    assert windows[0, 0] == 257
    assert (windows == 257).sum() == 1


def test_a_reference_measures_the_distance(lm):
    near, far = lm.quantize("w8a16"), lm.quantize("w3a16")
    same = evaluate_text(lm, TEXT, reference=lm)
    assert (same.kl, same.top1) == (0, 1)
    close = evaluate_text(near, TEXT, reference=lm)
    away = evaluate_text(far, TEXT, reference=lm)
    assert 0 < close.kl < away.kl
    assert close.top1 > away.top1


def test_a_text_shorter_than_a_window_is_one_window(lm):
    found = evaluate_text(lm, "import os")
    assert found.tokens == 8


@pytest.mark.parametrize("text", ["", "i"])
def test_refuses_a_text_without_anything_to_predict(lm, text):
    with pytest.raises(ValueError, match="give a longer text"):
        perplexity(lm, text)


def test_refuses_a_window_beyond_the_context(lm):
    with pytest.raises(ValueError, match=r"window is 65 tokens.*context of 64"):
        perplexity(lm, TEXT, window=65)


def test_refuses_a_reference_with_other_tokens(lm, tmp_path):
    wider = load_model(write_tiny(tmp_path / "wide", vocab_size=300))
    with pytest.raises(ValueError, match="258 tokens and the reference 300"):
        evaluate_text(lm, TEXT, reference=wider)
    begun = load_model(write_tiny(tmp_path / "begun", begin=True))
    with pytest.raises(ValueError, match="tokenizer cuts the text"):
        evaluate_text(lm, TEXT, reference=begun)


def test_batches_are_bounded_by_their_logits():
    assert batch_size(258, 64) == 8
    assert batch_size(128_256, 2048) == 1
    assert batch_size(2048, 2048) == 4
