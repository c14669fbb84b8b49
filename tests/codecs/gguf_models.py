"""Tiny models of every architecture in GGUF, and what such a file holds."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

import jaxq
from jaxq.codecs.gguf_file import read_file
from jaxq.codecs.gguf_write import GGUFSink
from jaxq.models import find_family
from tests.codecs.excerpts import write_gguf
from tests.tiny_lm import CONFIG, write_tiny

GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "final_logit_softcapping": 20.0}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**GEMMA, "num_hidden_layers": 6, "rope_theta": 1e6},
    ),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 16, "partial_rotary_factor": 0.5}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES |= {
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6}
        | {"num_hidden_layers": 1},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **MOE,
            "num_hidden_layers": 1,
            "num_experts": 6,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**MOE, "num_experts": 4, "norm_topk_prob": True, "head_dim": 32},
    ),
}
# the keys of a Llama that others do not have
OTHER = dict.fromkeys(
    ["intermediate_size", "num_key_value_heads", "rms_norm_eps", "hidden_act"]
)
_LLAMAS = dict.fromkeys(["hidden_size", "num_hidden_layers", "num_attention_heads"])
_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 48, "n_inner": 96}
_EPS = {"layer_norm_epsilon": 2**-17}
_BLOOM = {
    "seq_length": 2048,
    "hidden_size": 64,
    "n_head": 4,
    "n_layer": 2,
    "tie_word_embeddings": True,
}
_NEOX = {
    "intermediate_size": 96,
    "layer_norm_eps": 2**-17,
    "rotary_pct": 0.5,
    "rotary_emb_base": 5000,
    "use_parallel_residual": False,
}
_FALCON = {**_EPS, "num_kv_heads": 2, "tie_word_embeddings": True}
_BERT = {
    "num_key_value_heads": None,
    "rms_norm_eps": None,
    "hidden_act": "gelu",
    "layer_norm_eps": 2**-17,
    "type_vocab_size": 3,
    "tie_word_embeddings": True,
}
_T5 = {
    **{"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 1},
    **{"num_decoder_layers": 2, "relative_attention_num_buckets": 8},
    **{"layer_norm_epsilon": 2**-17, "is_encoder_decoder": True},
    **{"decoder_start_token_id": 3, "n_positions": 512},
}
# transformers reads from GGUF no more layers of the decoder than the encoder has
_GATED = {"feed_forward_proj": "gated-gelu", "num_layers": 2}
_TWO_NORMS = {"new_decoder_architecture": True, "ffn_hidden_size": 96}
_NO_CONTEXT = {"max_position_embeddings": None}
FAMILIES |= {
    "gpt2": (
        "GPT2LMHeadModel",
        {**OTHER, **_LLAMAS, **_NO_CONTEXT, **_EPS, **_GPT2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**OTHER, **_NEOX}),
    "bloom": (
        "BloomForCausalLM",
        {**OTHER, **_LLAMAS, **_NO_CONTEXT, **_EPS, **_BLOOM},
    ),
    "falcon": ("FalconForCausalLM", {**OTHER, **_FALCON, "multi_query": True}),
    "bert": ("BertModel", _BERT),
    "t5": (
        "T5ForConditionalGeneration",
        {**OTHER, **_LLAMAS, **_NO_CONTEXT, **_T5, **_GATED},
    ),
    "t5, not gated": (
        "T5ForConditionalGeneration",
        {**OTHER, **_LLAMAS, **_NO_CONTEXT, **_T5, "decoder_start_token_id": 0},
    ),
    "falcon, two norms": ("FalconForCausalLM", {**OTHER, **_FALCON, **_TWO_NORMS}),
}
REFUSED = {
    "qwen2": ("Qwen2ForCausalLM", {"max_window_layers": 1, "sliding_window": 8}),
    "mistral": ("MistralForCausalLM", {}),
    "opt": ("OPTForCausalLM", {**OTHER, "ffn_dim": 128}),
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the config of a model, without the keys of a Llama that it has not."""
    name, more = {**FAMILIES, **REFUSED}[model_type]
    # GGUF's numbers are float32
    kind, _, _ = model_type.partition(",")
    about = {"architectures": [name], "model_type": kind, "rms_norm_eps": 2**-17}
    about, other = {**CONFIG, **about, **more, **changes}, {*OTHER, *_LLAMAS}
    other |= {*_NO_CONTEXT}
    return {k: v for k, v in about.items() if v is not None or k not in other}


def write_model(folder: Path, model_type: str, **changes: Any):
    """A float model in GGUF without its config, and the model."""
    config = config_of(model_type, **changes)
    nulls = dict.fromkeys(CONFIG.keys() - config.keys())
    hf = write_tiny(folder / "hf", **nulls, **config)
    (hf / "config.json").write_text(json.dumps(config))
    lm = jaxq.load_model(hf)
    config = json.loads(lm.files["config.json"])
    out = folder / "gguf"
    out.mkdir()
    sink = GGUFSink(out, config, 8)
    for tensor, slot in find_family(config).slots(lm.config).items():
        value = functools.reduce(lambda tree, key: tree[key], slot.path, lm.params)
        value = value if slot.place is None else value[slot.place]
        sink.floating(tensor, np.asarray(value.T if slot.transposed else value), False)
    sink.close(config)
    (out / "config.json").unlink()
    return lm, out / "model.gguf"


def read_raw(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a file, and type, shape and bytes of every tensor."""
    file, data = read_file(path), path.read_bytes()
    return dict(file.values), {
        name: (t.type, t.shape, data[t.start : t.start + t.nbytes])
        for name, t in file.tensors.items()
    }


def rewrite(path: Path, values: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write such a file anew; a setting or a tensor that is None is left out."""
    path.unlink()
    write_gguf(
        path,
        {key: value for key, value in values.items() if value is not None},
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
    )
    return path
