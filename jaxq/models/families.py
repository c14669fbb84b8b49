"""The model architectures that load, and how to find the one of a config.

A new architecture is one file, with a reader of its config and a Flax module whose
variables are named as the checkpoint's tensors, and one row in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from jaxq.models.bert import Bert, MaskedBert, read_bert, read_masked_bert
from jaxq.models.bloom import Bloom, read_bloom
from jaxq.models.experts import SparseLlama
from jaxq.models.falcon import Falcon, read_falcon
from jaxq.models.family import ENCODER, ENCODER_DECODER, Family
from jaxq.models.family import Slot as Slot
from jaxq.models.family import checkpoint_name as checkpoint_name
from jaxq.models.gemma2 import Gemma, read_gemma2
from jaxq.models.gemma3 import read_gemma3
from jaxq.models.gpt2 import GPT2, read_gpt2
from jaxq.models.gpt_neox import GPTNeoX, read_gpt_neox
from jaxq.models.hf_config import ConfigError
from jaxq.models.llama import Llama, read_llama
from jaxq.models.mistral import read_mistral
from jaxq.models.mixtral import Mixtral, read_mixtral
from jaxq.models.opt import OPT, read_opt
from jaxq.models.phi3 import Phi3, read_phi3
from jaxq.models.qwen2 import read_qwen2
from jaxq.models.qwen2_moe import read_qwen2_moe
from jaxq.models.qwen3 import read_qwen3
from jaxq.models.qwen3_moe import read_qwen3_moe
from jaxq.models.roberta import (
    MaskedRoberta,
    read_masked_roberta,
    read_roberta,
)
from jaxq.models.t5 import T5, read_t5
from jaxq.names import lookup

_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_QWEN_MOE = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "mlp_only_layers": (),
}
_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# causal masks and their like, which old versions saved
_MASKS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
_ROTARY = ("rotary_emb.inv_freq",)

_POOLER = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
# the sentence pairs' head, and the other head's bias under its second name
_BERT_OTHER = (
    "cls.predictions.decoder.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)
_TRANSFORM = "cls.predictions.transform"
_BERT_HEADS = (
    *_POOLER,
    *_BERT_OTHER,
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    f"{_TRANSFORM}.dense.weight",
    f"{_TRANSFORM}.dense.bias",
    f"{_TRANSFORM}.LayerNorm.weight",
    f"{_TRANSFORM}.LayerNorm.bias",
    f"{_TRANSFORM}.LayerNorm.gamma",
    f"{_TRANSFORM}.LayerNorm.beta",
)
_ROBERTA_HEAD = (
    "lm_head.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "lm_head.dense.weight",
    "lm_head.dense.bias",
    "lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias",
)

_ROWS: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        Llama,
        read_llama,
        {"max_position_embeddings": 2048},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        Llama,
        read_mistral,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    Family("qwen2", "Qwen2ForCausalLM", Llama, read_qwen2, _QWEN),
    Family("qwen3", "Qwen3ForCausalLM", Llama, read_qwen3, {**_QWEN, "head_dim": 128}),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        Mixtral,
        read_mixtral,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1_000_000.0,
        },
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        SparseLlama,
        read_qwen2_moe,
        {
            **_QWEN_MOE,
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "qkv_bias": True,
        },
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        SparseLlama,
        read_qwen3_moe,
        {
            **_QWEN_MOE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        Gemma,
        read_gemma2,
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        Gemma,
        read_gemma3,
        {**_GEMMA, "max_position_embeddings": 131072, "vocab_size": 262208},
        model_type="gemma3_text",
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        Phi3,
        read_phi3,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2,
        read_gpt2,
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
        },
        prefix="transformer.",
        in_out=True,
        unused=_MASKS,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        OPT,
        read_opt,
        {"max_position_embeddings": 2048},
        prefix="model.decoder.",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        GPTNeoX,
        read_gpt_neox,
        {"max_position_embeddings": 2048},
        prefix="gpt_neox.",
        outside=frozenset({"embed_out"}),
        unused=(*_MASKS, *_ROTARY),
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        Bloom,
        read_bloom,
        {},
        prefix="transformer.",
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        Falcon,
        read_falcon,
        {"max_position_embeddings": 2048},
        prefix="transformer.",
    ),
    Family(
        "bert",
        "BertModel",
        Bert,
        read_bert,
        {},
        prefix="bert.",
        outside=frozenset(),
        kind=ENCODER,
        unused=_BERT_HEADS,
    ),
    Family(
        "masked_bert",
        "BertForMaskedLM",
        MaskedBert,
        read_masked_bert,
        {},
        model_type="bert",
        prefix="bert.",
        outside=frozenset({"cls"}),
        kind=ENCODER,
        unused=(*_POOLER, "cls.predictions.decoder.weight", *_BERT_OTHER),
    ),
    Family(
        "roberta",
        "RobertaModel",
        Bert,
        read_roberta,
        {},
        prefix="roberta.",
        outside=frozenset(),
        kind=ENCODER,
        unused=(*_POOLER, *_ROBERTA_HEAD),
    ),
    Family(
        "masked_roberta",
        "RobertaForMaskedLM",
        MaskedRoberta,
        read_masked_roberta,
        {},
        model_type="roberta",
        prefix="roberta.",
        kind=ENCODER,
        unused=(*_POOLER, "lm_head.decoder.weight", "lm_head.decoder.bias"),
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        T5,
        read_t5,
        {},
        prefix="",
        kind=ENCODER_DECODER,
        unused=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed `config.json`, by `architectures` or `model_type`.

    Raises:
        UnknownNameError: the architecture is not known; says which are.
        ConfigError: the config names no architecture.
    """
    named = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in named:
            return family
    if named:
        table = {family.architecture: family for family in FAMILIES.values()}
        return lookup(table, str(named[0]), "model architecture")
    if "model_type" not in config:
        raise ConfigError(
            "config.json has neither 'architectures' nor 'model_type', so nothing says "
            f"which model this is; known are {', '.join(FAMILIES)}"
        )
    # the first row of a type is the one that the type alone means
    types = {f.model_type or f.name: f for f in reversed(FAMILIES.values())}
    return lookup(types, str(config["model_type"]), "model family")
