"""GGUF of the families of which no file is kept: against gguf, llama.cpp's package,
whose names and settings those of its converter are, and against transformers."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QuantSpec, Recipe, Rule
from jaxq.encoder_decoder import EncoderDecoder
from tests.codecs.gguf_models import FAMILIES, read_raw, write_model

pytestmark = [pytest.mark.compare, pytest.mark.filterwarnings("ignore")]

TOKENS = np.arange(20, dtype=np.int32)[None] * 11 % 250
NEW = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "bloom": "bloom",
    "bert": "bert",
    "t5": "t5",
    "t5, not gated": "t5",
    "falcon": "falcon",
    "falcon, two norms": "falcon",
}
STACKED = {"w1": "layers.{}.feed_forward.experts.w1"}
STACKED |= {w: STACKED["w1"].replace("w1", w) for w in ("w2", "w3")}
STACKED |= {
    w: f"model.layers.{{}}.mlp.experts.{w}"
    for w in ("gate_proj", "up_proj", "down_proj")
}


def _settings(writer, config, model_type):
    """Say what llama.cpp's converter says of a model."""
    get = config.get
    heads = get("num_attention_heads") or get("n_head") or get("num_heads")
    hidden = get("hidden_size") or get("n_embd") or get("d_model")
    layers = get("num_hidden_layers") or get("n_layer") or get("num_layers")
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    context = get("max_position_embeddings") or get("n_positions")
    writer.add_context_length(context or config["seq_length"])
    wide = get("intermediate_size") or get("n_inner") or get("ffn_hidden_size")
    wide = wide or get("d_ff")
    writer.add_feed_forward_length(wide or 4 * hidden)
    if get("rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
        experts = get("num_experts") or get("num_local_experts")
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    else:
        writer.add_layer_norm_eps(get("layer_norm_eps") or get("layer_norm_epsilon"))
    _of_family(writer, config, model_type, hidden // heads)


def _of_family(writer, config, model_type, head):
    """Say what only some families have."""
    get = config.get
    if get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if get("shared_expert_intermediate_size"):
        size = config["shared_expert_intermediate_size"]
        writer.add_expert_shared_feed_forward_length(size)
    if model_type == "mixtral":
        writer.add_rope_dimension_count(head)
    if model_type == "gpt_neox":
        writer.add_rope_dimension_count(int(config["rotary_pct"] * head))
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_rope_freq_base(config["rotary_emb_base"])
    if model_type == "t5":
        writer.add_decoder_block_count(config["num_decoder_layers"])
        writer.add_key_length(config["d_kv"])
        writer.add_value_length(config["d_kv"])
        writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
        buckets = config["relative_attention_num_buckets"]
        writer.add_relative_attn_buckets_count(buckets)
        writer.add_decoder_start_token_id(config["decoder_start_token_id"])
    if model_type == "bert":
        writer.add_causal_attention(False)
        writer.add_token_type_count(config["type_vocab_size"])
    if model_type == "falcon":
        grouped = get("new_decoder_architecture")
        writer.add_head_count_kv(config["num_kv_heads"] if grouped else 1)
        writer.add_tensor_data_layout("jploski")


def _moved(name, value, config, model_type):
    """Move rows as llama.cpp's converter does."""
    heads = config.get("num_attention_heads") or config.get("n_head")
    rest = value.shape[1:]
    if model_type == "mixtral" and ("q_proj" in name or "k_proj" in name):
        count = heads if "q_proj" in name else config["num_key_value_heads"]
        halves = value.reshape(count, 2, -1, *rest)
        return np.stack([halves[:, 0], halves[:, 1]], 2).reshape(value.shape)
    if model_type in ("gpt_neox", "bloom") and "query_key_value" in name:
        parts = value.reshape(heads, 3, -1, *rest)
        return np.concatenate([parts[:, i].reshape(-1, *rest) for i in range(3)])
    if model_type == "falcon" and "query_key_value" in name:
        keys = config["num_kv_heads"] if config.get("new_decoder_architecture") else 1
        parts = value.reshape(keys, heads // keys + 2, -1, *rest)
        q, k, v = parts[:, :-2], parts[:, [-2]], parts[:, [-1]]
        return np.concatenate([part.reshape(-1, *rest) for part in (q, k, v)])
    if model_type == "gpt2" and name.endswith(
        (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    ):
        return value.T
    return value


def _stack(tensors):
    """Return tensors by name, those of experts under their common name."""
    found, experts = {}, {}
    for name, value in tensors.items():
        if ".experts." not in name:
            found[name] = value
            continue
        before, _, after = name.partition(".experts.")
        place, leaf, _ = after.split(".")
        layer = before.split(".")[2]
        common = STACKED[leaf].format(layer) + ".weight"
        experts.setdefault(common, {})[int(place)] = value
    for name, parts in experts.items():
        found[name] = np.stack([parts[i] for i in range(len(parts))])
    return found


def _convert(folder, family, path):
    """Write the model of a folder with llama.cpp's package."""
    import gguf
    from safetensors.numpy import load_file

    model_type, arch = family.partition(",")[0], NEW[family]
    config = json.loads((folder / "config.json").read_text())
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 2
    names = gguf.get_tensor_name_map(number, layers)
    writer = gguf.GGUFWriter(path, arch)
    _settings(writer, config, model_type)
    for name, value in _stack(load_file(folder / "model.safetensors")).items():
        before = {"bloom": "transformer.", "bert": "bert."}.get(arch, "")
        known = name.removeprefix(before)
        new = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        value = _moved(name, value, config, model_type).squeeze()
        writer.add_tensor(new, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _theirs(folder, **options):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    about = json.loads((folder / "config.json").read_text())["model_type"]
    kinds = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM}
    kind = kinds.get(about, AutoModelForCausalLM)
    tokens = torch.tensor(TOKENS)
    inputs = {"decoder_input_ids": tokens[:, :7]} if about == "t5" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", **options
        )
    with torch.no_grad():
        found = model(tokens, **inputs)
    return (found.last_hidden_state if about == "bert" else found.logits).numpy()


def _ours(lm):
    import jax

    leaf = lambda x: isinstance(x, jaxq.QTensor)
    wide = lambda x: x.dequantize(jnp.float32) if leaf(x) else x
    params = jax.tree.map(wide, lm.params, is_leaf=leaf)
    tokens = jnp.asarray(TOKENS)
    inputs = (tokens[:, :7],) if isinstance(lm, EncoderDecoder) else ()
    return np.asarray(lm.forward(params, tokens, *inputs))


@pytest.mark.parametrize("family", NEW)
def test_the_file_is_the_one_that_llama_cpps_package_makes(tmp_path, family):
    """Tensors to the bit; and every setting of the converter's is there."""
    _, path = write_model(tmp_path, family)
    theirs = _convert(tmp_path / "hf", family, tmp_path / "theirs.gguf")
    settings, tensors = read_raw(path)
    wanted, expected = read_raw(theirs)
    assert tensors == expected
    for key, value in wanted.items():
        assert settings[key] == value, key


@pytest.mark.parametrize("family", NEW)
def test_what_is_read_computes_what_transformers_does(tmp_path, family):
    """The file is of llama.cpp's package; transformers has the model's own folder."""
    write_model(tmp_path, family)
    theirs = _convert(tmp_path / "hf", family, tmp_path / "theirs.gguf")
    ours, wanted = _ours(jaxq.load_model(theirs)), _theirs(tmp_path / "hf")
    np.testing.assert_allclose(ours, wanted, atol=1e-4 * float(wanted.std()))


# of the new ones, those of which transformers reads GGUF
@pytest.mark.parametrize(
    "family", ["qwen2_moe", "qwen3_moe", "gpt2", "bloom", "falcon", "t5"]
)
def test_transformers_reads_what_is_written(tmp_path, family):
    from transformers import AutoConfig

    lm, _ = write_model(tmp_path, family)
    spec = QuantSpec("int8", 32, scale="float16")
    names = ("*experts*", "*shared_expert*", "*kernel")
    rules = (
        Rule("*embed*"),
        *(Rule(name, spec, required=False) for name in names),
        Rule("*"),
    )
    small = lm.quantize(Recipe("mine", rules))
    done = jaxq.convert(small, tmp_path / "out", "gguf")
    assert done.lossless
    # settings that its reader of GGUF leaves out come from the model's own config
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    theirs = _theirs(tmp_path / "out", gguf_file="model.gguf", config=config)
    ours = _ours(small)
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * float(ours.std()))
    again = jaxq.load_model(tmp_path / "out" / "model.gguf")
    np.testing.assert_allclose(_ours(again), ours, atol=1e-5 * float(ours.std()))


def test_every_new_family_is_compared():
    assert set(NEW) == set(FAMILIES) - {
        *("gemma2", "gemma3_text", "phi3", "qwen3", "llama")
    }
