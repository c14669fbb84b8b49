"""Tiny models whose weights are a seed: only their config and logits are stored."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxq.models import FAMILIES, find_family

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
SEEDED = Path(__file__).parent.parent / "data" / "seeded"

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 3.0],
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
OPT = {k: v for k, v in NEOX.items() if k != "intermediate_size"}
OPT |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2} | IDS
FALCON = {k: v for k, v in NEOX.items() if k != "intermediate_size"}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
} | IDS
# the families whose configs have all keys of SMALL
_SMALL = ("llama", "mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3", "phi3")


def _rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    # Wavelengths of 6, 20, 63 and 199 tokens: every scaling has something to bend.
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


# row of FAMILIES, and keys of the config beside SMALL's
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # 24 tokens in a context of 16: the base grows with the text
    "llama_dynamic": (
        "llama",
        _rope("dynamic", factor=2.0) | {"max_position_embeddings": 16},
    ),
    "mixtral": ("mixtral", _rope() | {"num_local_experts": 4}),
    "mixtral_windowed": (
        "mixtral",
        _rope() | {"num_local_experts": 4, "sliding_window": 5},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        _rope() | EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 20},
    ),
    "qwen2_moe_mixed": (
        "qwen2_moe",
        _rope()
        | EXPERTS
        | {
            "num_experts": 6,
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        _rope() | EXPERTS | {"num_experts": 6, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        _rope() | EXPERTS | {"num_experts": 6, "head_dim": 8, "mlp_only_layers": [0]},
    ),
    "gemma2": (
        "gemma2",
        _rope()
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1000.0,
                },
            },
        },
    ),
    "phi3": ("phi3", _rope() | {"sliding_window": 7}),
    "phi3_longrope": (
        "phi3",
        {
            "rope_parameters": LONG | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 32,
        },
    ),
    "phi3_longrope_long": (
        "phi3",
        {
            "rope_parameters": LONG | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 16,
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2_wide": ("gpt2", GPT2 | {"n_inner": 48, "activation_function": "gelu"}),
    "opt": ("opt", OPT),
    # as the one of 350 million parameters
    "opt_behind": (
        "opt",
        OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt_neox": ("gpt_neox", NEOX | _rope(partial_rotary_factor=0.5)),
    "gpt_neox_serial": (
        "gpt_neox",
        NEOX
        | _rope(partial_rotary_factor=0.25)
        | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "bloom": ("bloom", BLOOM | {"n_head": 4}),
    # six heads: slopes between those of a power of two
    "bloom_normed": (
        "bloom",
        BLOOM
        | {
            "n_head": 6,
            "hidden_size": 48,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon_7b": ("falcon", FALCON | _rope()),
    "falcon_40b": (
        "falcon",
        FALCON | _rope() | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_11b": (
        "falcon",
        FALCON
        | _rope()
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "ffn_hidden_size": 48,
        },
    ),
    "falcon_rw": (
        "falcon",
        FALCON
        | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bert": ("bert", NEOX),
    "masked_bert": ("masked_bert", NEOX | {"hidden_act": "gelu_new"}),
    "roberta": ("roberta", NEOX | {"pad_token_id": 1, "type_vocab_size": 1}),
    "masked_roberta": ("masked_roberta", NEOX | {"pad_token_id": 1}),
    "t5": ("t5", T5),
    "t5_gated": (
        "t5",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def settings_of(name: str) -> dict[str, Any]:
    """The keys that a case's config is made with."""
    family, changes = CASES[name]
    small = SMALL if family in _SMALL else {}
    return small | changes | {"architectures": [FAMILIES[family].architecture]}


def seeded_weights(slots: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(0)
    weights = {}
    for name in sorted(slots):
        shape = slots[name].shape
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        values = rng.normal(0, scale, shape)
        norm = any(part in name.lower() for part in ("norm", "ln_"))
        norm = norm and name.endswith("weight")
        weights[name] = (values + (1.0 if norm else 0.0)).astype(jnp.bfloat16)
    return weights


def write_seeded(folder: Path, hf_config: dict[str, Any]) -> Path:
    """Write the Hugging Face folder of a config, with weights from the seed."""
    family = find_family(hf_config)
    slots = family.slots(family.read_config(hf_config))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        seeded_weights(slots), folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(hf_config, indent=1) + "\n")
    return folder


def stored_config(name: str) -> dict[str, Any]:
    """A case's config, as transformers wrote it."""
    return json.loads((SEEDED / name / "config.json").read_text())
