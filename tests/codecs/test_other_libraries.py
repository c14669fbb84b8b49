"""Both ways with the libraries themselves: transformers, bitsandbytes, gguf, ..."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, Recipe, Rule
from tests.tiny_lm import write_tiny

pytestmark = [
    pytest.mark.compare,
    pytest.mark.filterwarnings("ignore"),
]

TOKENS = np.arange(20, dtype=np.int32)[None]
GROUP = {"grid": "gptq", "scale": "bfloat16"}
NVFP4 = QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor"))

# What we write: target, how weights are quantized, dtype that the library computes in,
# how far its logits may be from ours, relative to their spread.
WRITTEN = [
    ("bitsandbytes", QuantSpec("nf4", 64), "bfloat16", 0.1),
    ("bitsandbytes", QuantSpec("nf4", 32), "bfloat16", 0.1),
    ("bitsandbytes", QuantSpec("fp4_bnb", 64), "bfloat16", 0.1),
    ("bitsandbytes", QuantSpec("int8", "channel"), "float16", 0.1),
    ("compressed-tensors", QuantSpec("int4", 32, **GROUP), "float32", 1e-3),
    ("compressed-tensors", QuantSpec("int3", 32, **GROUP), "float32", 1e-3),
    (
        "compressed-tensors",
        QuantSpec("uint4", 32, symmetric=False, scale="bfloat16"),
        "float32",
        0.05,  # weights are rounded to bfloat16 on the way
    ),
    ("compressed-tensors", QuantSpec("int8", scale="bfloat16"), "float32", 1e-3),
    ("compressed-tensors", QuantSpec("fp8_e4m3"), "float32", 1e-3),
    ("compressed-tensors", QuantSpec("fp4_e2m1", 32, scale="e8m0"), "bfloat16", 0.1),
    ("compressed-tensors", NVFP4, "bfloat16", 0.1),
    ("fp8", QuantSpec("fp8_e4m3", (128, 128)), "bfloat16", 0.1),
    ("gguf", QuantSpec("int8", 32, scale="float16"), "float32", 1e-3),
    (
        "gguf-q4_0",
        QuantSpec("int4", 32, grid="full", scale="float16"),
        "float32",
        1e-3,
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny") / "model"
    return write_tiny(place, dtype="bfloat16", hidden_size=128, intermediate_size=256)


def _recipe(spec):
    rules = (Rule("*embed*"), Rule("*lm_head*"), Rule("*layers*kernel", spec))
    return Recipe("mine", (*rules, Rule("*")))


def _ours(lm):
    """Float32 logits of what the weights stand for, unrounded, on float activations."""

    def wide(leaf):
        if isinstance(leaf, jaxq.QTensor):
            return leaf.dequantize(jnp.float32)
        return leaf.astype(jnp.float32)

    leaf = lambda x: isinstance(x, jaxq.QTensor)
    return np.asarray(
        lm.forward(jax.tree.map(wide, lm.params, is_leaf=leaf), jnp.asarray(TOKENS))
    )


def _theirs(folder, dtype, **options):
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map="cpu", **options
        )
    with torch.no_grad():
        return model, model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize(
    ("to", "spec", "dtype", "tolerance"),
    WRITTEN,
    ids=lambda v: v.format if isinstance(v, QuantSpec) else str(v),
)
def test_transformers_computes_the_same_from_what_we_write(
    tmp_path, folder, to, spec, dtype, tolerance
):
    lm = jaxq.load_model(folder).quantize(_recipe(spec))
    jaxq.convert(lm, tmp_path / "out", to)
    options = {"gguf_file": "model.gguf"} if to.startswith("gguf") else {}
    if not spec.symmetric:
        # Packed zero points are read on this route only, llm-compressor's own as well.
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    _, theirs = _theirs(tmp_path / "out", dtype, **options)
    ours = _ours(lm)
    np.testing.assert_allclose(theirs, ours, atol=tolerance * float(ours.std()))


def test_transformers_ties_a_head_to_a_table_that_stayed_float(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "dtype": "bfloat16"}
    folder = write_tiny(tmp_path / "in", tie_word_embeddings=True, **sizes)
    rules = (Rule("*embed*"), Rule("*layers*kernel", QuantSpec("int4", 32, **GROUP)))
    lm = jaxq.load_model(folder).quantize(Recipe("mine", (*rules, Rule("*"))))
    jaxq.convert(lm, tmp_path / "out", "compressed-tensors")
    _, theirs = _theirs(tmp_path / "out", "float32")
    ours = _ours(lm)
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * float(ours.std()))


GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "num_key_value_heads": 1,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        # its config has tokens up to 32000, which no GGUF file changes
        ("Phi3ForCausalLM", {"model_type": "phi3", "vocab_size": 32064}),
        ("Gemma2ForCausalLM", {**GEMMA, "model_type": "gemma2"}),
        (
            "Gemma3ForCausalLM",
            {**GEMMA, "model_type": "gemma3_text", "rope_theta": 1e6}
            | {"num_hidden_layers": 6},
        ),
    ],
)
def test_transformers_reads_other_families_from_gguf(tmp_path, architecture, changes):
    """From the file alone: names, shifted norms and settings are llama.cpp's."""
    folder = write_tiny(tmp_path / "in", architectures=[architecture], **changes)
    spec = QuantSpec("int8", 32, scale="float16")
    rules = (Rule("*embed*"), Rule("*layers*kernel", spec), Rule("*"))
    lm = jaxq.load_model(folder).quantize(Recipe("mine", rules))
    done = jaxq.convert(lm, tmp_path / "out", "gguf")
    assert done.lossless
    (tmp_path / "out" / "config.json").unlink()
    _, theirs = _theirs(tmp_path / "out", "float32", gguf_file="model.gguf")
    ours = _ours(lm)
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * float(ours.std()))
    again = jaxq.load_model(tmp_path / "out" / "model.gguf")
    np.testing.assert_allclose(_ours(again), ours, atol=1e-4 * float(ours.std()))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": True,
        },
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4-double", "int8"],
)
def test_we_read_what_bitsandbytes_writes(tmp_path, folder, settings):
    from transformers import BitsAndBytesConfig

    dtype = "float16" if settings.get("load_in_8bit") else "bfloat16"
    config = BitsAndBytesConfig(**settings)
    model, _ = _theirs(folder, dtype, quantization_config=config)
    model.save_pretrained(tmp_path / "theirs")
    _, theirs = _theirs(tmp_path / "theirs", dtype)  # as saved: scales may be rounded
    lm = jaxq.load_model(tmp_path / "theirs")
    assert lm.codec == "bitsandbytes"
    assert not lm.notes
    np.testing.assert_allclose(_ours(lm), theirs, atol=0.1 * float(theirs.std()))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_that_ggufs_own_package_makes(name):
    from gguf import GGMLQuantizationType, quants

    from jaxq.codecs.gguf_blocks import TYPES

    kind = GGMLQuantizationType[name]
    x = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    data = quants.quantize(x, kind)
    row = TYPES[int(kind)]
    blocks = data.reshape(6, -1, row.nbytes)
    ours = np.asarray(row.decode(blocks).tensor().dequantize()).T
    np.testing.assert_array_equal(ours, quants.dequantize(data, kind))


def test_compressed_tensors_unpacks_what_we_pack():
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    from jaxq.codecs.words import pack_stream

    codes = np.random.default_rng(0).integers(0, 16, (8, 64), np.uint8)
    import torch

    words = torch.tensor(pack_stream(codes, 4, 1))
    theirs = unpack_from_int32(words, 4, torch.Size(codes.shape)).numpy()
    np.testing.assert_array_equal(theirs, codes.astype(np.int8) - 8)
