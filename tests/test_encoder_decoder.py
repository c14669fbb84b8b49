"""`EncoderDecoder`: one text in, another out."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.encoder_decoder import EncoderDecoder
from jaxq.lift import quantized
from jaxq.lm import load_model
from tests.models.seeded import settings_of, write_seeded
from tests.tiny_lm import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = settings_of("t5") | {"vocab_size": 258, "eos_token_id": 256}
    config |= {"model_type": "t5"}
    folder = write_seeded(tmp_path_factory.mktemp("t5") / "tiny", config)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return load_model(folder, jnp.float32)


def uncached(model, prompt, new):
    """The definition: the likeliest token after all so far, again and again."""
    read, written = jnp.asarray(model.tokens_of(prompt))[None], np.zeros((1, new), int)
    for place in range(new):
        # what stands behind a token does not change its logits
        logits = model.apply(model.params, read, jnp.asarray(written, jnp.int32))
        token = int(jnp.argmax(logits[0, place]))
        if token in model.eos:
            return written[0, 1 : place + 1]
        if place + 1 < new:
            written[0, place + 1] = token
    return np.append(written[0, 1:], token)


@pytest.mark.parametrize("cfg", [None, pytest.param("w4a16", marks=pytest.mark.slow)])
def test_the_likeliest_text_is_the_one_without_a_cache_or_padding(model, cfg):
    assert isinstance(model, EncoderDecoder)
    model = model if cfg is None else model.quantize(cfg)
    for prompt in ("import os", "x = 1 + y"):  # of one length
        want = uncached(model, prompt, 12)
        assert len(set(want.tolist())) > 1
        assert model.generate(prompt, 12) == model.decode(want)


def test_a_text_ends_where_its_last_token_would_be(model):
    want = uncached(model, "import os", 12).tolist()
    end = want[5]
    ending = dataclasses.replace(model, eos=(end,))
    assert ending.generate("import os", 12) == model.decode(want[: want.index(end)])


def test_a_second_text_is_no_reason_to_trace_again(model):
    traces = Counter()

    def apply(params, tokens, targets, mask=None, cache=None):
        traces[None if tokens is None else tokens.shape, targets.shape] += 1
        return model.forward(params, tokens, targets, mask, cache)

    counted = dataclasses.replace(model, apply=quantized(apply))
    counted.generate("import os", 9)
    counted.generate("import", 12, temperature=0.5)
    assert traces == {((1, 16), (1, 1)): 1, (None, (1, 1)): 1}


def test_draws_are_as_a_causal_models(model):
    hot = [model.generate("a", 12, temperature=9.0, seed=s) for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert model.generate("a", 12, temperature=9.0, top_k=1) == model.generate("a", 12)


def test_going_on_without_a_text_is_refused(model):
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="no text is in the cache"):
        model.apply(model.params, None, one, None, model.empty_cache(4))


@pytest.mark.slow
def test_calibration_reads_a_text_and_writes_it_again(model):
    tokens = jnp.asarray([[5, 6, 7]], jnp.int32)
    assert [x.tolist() for x in model.inputs(tokens)] == [[[5, 6, 7]], [[0, 5, 6]]]
    data = np.random.default_rng(0).integers(2, 250, (4, 24)).astype(np.int32)
    small = model.quantize("w8a8-smoothquant", calibration=data)
    cross = small.evidence["params/decoder/block_1/layer_1/EncDecAttention/k/kernel"]
    assert cross["tokens"] == data.size
    got = small.apply(small.params, *model.inputs(jnp.asarray(data)))
    want = model.forward(model.params, *model.inputs(jnp.asarray(data)))
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize(("prompt", "tokens"), [("", 4), ("a", 0)])
def test_nothing_to_do_is_refused(model, prompt, tokens):
    with pytest.raises(ValueError, match=r"prompt has no tokens|1 or more"):
        model.generate(prompt, tokens)
