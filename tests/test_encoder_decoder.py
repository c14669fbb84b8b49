"""`EncoderDecoder`: one text in, another out."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.encoder_decoder import EncoderDecoder
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


def test_the_likeliest_text_does_not_depend_on_padding(model):
    assert isinstance(model, EncoderDecoder)
    read, written = jnp.asarray(model.tokens_of("import os"))[None], [0]
    for _ in range(2):
        logits = model.forward(model.params, read, jnp.asarray([written]))
        written.append(int(jnp.argmax(logits[0, -1])))
    assert 256 not in written
    assert model.generate("import os", 2) == model.decode(written[1:])


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
