"""What GGUF calls the tensors and settings of the architectures that are known."""

import dataclasses
from collections.abc import Mapping

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = {**_ATTENTION, "ffn_norm": "post_attention_layernorm", **_MLP}
_GEMMA = {
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **_MLP,
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPARSE = {**_ATTENTION, "ffn_norm": "post_attention_layernorm"}
_MIXTRAL = {**_SPARSE, "ffn_gate_inp": "block_sparse_moe.gate"}
_QWEN_MOE = {**_SPARSE, "ffn_gate_inp": "mlp.gate"}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_NEOX_TOP = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_WIDE_MLP = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NEOX = {
    **_NORMS,
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    **_WIDE_MLP,
}
_FALCON_TOP = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOOM_TOP = {
    **_FALCON_TOP,
    "token_embd_norm": "transformer.word_embeddings_layernorm",
}
_FALCON = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    **_WIDE_MLP,
}
_BLOOM = {**_NORMS, **_FALCON}
_FALCON_7B = {"attn_norm": "input_layernorm", **_FALCON}
_FALCON_40B = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn", **_FALCON}
_BERT_TOP = {
    "token_embd": "bert.embeddings.word_embeddings",
    "token_types": "bert.embeddings.token_type_embeddings",
    "position_embd": "bert.embeddings.position_embeddings",
    "token_embd_norm": "bert.embeddings.LayerNorm",
}
_BERT = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_T5_TOP = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "dec.output_norm": "decoder.final_layer_norm",
    "output": "lm_head",
}
_T5_SELF = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
}
_T5_CROSS = {
    "cross_attn_norm": "layer.1.layer_norm",
    "cross_attn_q": "layer.1.EncDecAttention.q",
    "cross_attn_k": "layer.1.EncDecAttention.k",
    "cross_attn_v": "layer.1.EncDecAttention.v",
    "cross_attn_o": "layer.1.EncDecAttention.o",
}


def _t5(**ffn: str) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return the two stacks of a T5, whose feed-forward layers are called so."""

    def last(place: int) -> dict[str, str]:
        names = {k: f"layer.{place}.DenseReluDense.{v}" for k, v in ffn.items()}
        return {"ffn_norm": f"layer.{place}.layer_norm", **names}

    return {
        "enc.blk": ("encoder.block", {**_T5_SELF, **last(1)}),
        "dec.blk": ("decoder.block", {**_T5_SELF, **_T5_CROSS, **last(2)}),
    }


# GGUF's key -> Hugging Face's
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
KEYS = {
    **_SIZES,
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_NEOX_KEYS = {
    **_SIZES,
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
    "rope.freq_base": "rotary_emb_base",
}
_BLOOM_KEYS = {
    "block_count": "n_layer",
    "context_length": "seq_length",
    "embedding_length": "hidden_size",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_FALCON_KEYS = {
    **_SIZES,
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count_kv": "num_kv_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "rope.freq_base": "rope_theta",
}
_T5_KEYS = {
    "block_count": "num_layers",
    "decoder_block_count": "num_decoder_layers",
    "context_length": "n_positions",
    "embedding_length": "d_model",
    "feed_forward_length": "d_ff",
    "attention.head_count": "num_heads",
    "attention.key_length": "d_kv",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
    "decoder_start_token_id": "decoder_start_token_id",
}
_T5_WRITTEN = ("attention.value_length", "attention.layer_norm_epsilon")
_QWEN_MOE_KEYS = {
    **KEYS,
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Tables of rotary factors, which a config says as well.
ROTARY = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of model, and how a file holds it.

    Attributes:
        gguf: the value of ``general.architecture``.
        name: Hugging Face's class.
        model_types: as their configs have it; the first is what a file is read as.
        layer: GGUF's names in a block -> Hugging Face's.
        two: the same of an encoder and a decoder, by GGUF's names of their blocks, with
            Hugging Face's.
        keys: GGUF's settings -> Hugging Face's.
        sign: a tensor that a file of this kind has, and none of those below of the
            same ``gguf``.
        written: settings that are only written.
        absent: what is written for a setting that the model does not have.
        constants: settings that are always the same.
        rows: tables -> the setting that says how many rows they have.
        fixed: of Hugging Face's settings, those that no file says.
        biases: names in a block -> the setting that says that those have a bias.
        part: the setting that says which share of a head turns, where it is not all.
        experts: names of stacked matrices -> Hugging Face's of the one numbered ``{}``.
        in_out: whether Hugging Face's matrices in a block are ``[in, out]``.
        own_head: whether llama.cpp asks for a head beside the embedding.
        interleaved: whether the rotary halves of query and key rows are.
        fused: what Hugging Face calls the projection in which every key head has its
            queries, its key and its value together, which GGUF has apart.
        norm_offset: what norms' weights hold more than Hugging Face's.
        widest: blocks of the model whose queries llama.cpp scales by the width of all
            heads together, instead of by ``head_dim``; None: no setting says so.
    """

    gguf: str
    name: str
    model_types: tuple[str, ...]
    layer: Mapping[str, str]
    keys: Mapping[str, str]
    _: dataclasses.KW_ONLY
    sign: str | None = None
    top: Mapping[str, str] = dataclasses.field(default_factory=lambda: TOP)
    blocks: str = "model.layers"
    two: Mapping[str, tuple[str, Mapping[str, str]]] = dataclasses.field(
        default_factory=dict
    )
    written: tuple[str, ...] = ("attention.value_length", "rope.dimension_count")
    absent: Mapping[str, int] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    part: str | None = None
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    in_out: bool = False
    own_head: bool = False
    interleaved: bool = False
    fused: str | None = None
    norm_offset: float = 0.0
    widest: int | None = None

    @property
    def stacks(self) -> Mapping[str, tuple[str, Mapping[str, str]]]:
        """What blocks are called in GGUF -> in Hugging Face, and their names."""
        return self.two or {"blk": (self.blocks, self.layer)}

    @property
    def turns(self) -> bool:
        """Whether its heads turn by rotary angles."""
        return "rope.freq_base" in self.keys


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        "MixtralForCausalLM",
        ("mixtral",),
        _MIXTRAL,
        {
            **KEYS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
        sign="blk.0.ffn_gate_inp.weight",
        experts=_MIXTRAL_EXPERTS,
        interleaved=True,
    ),
    Architecture(
        "llama",
        "LlamaForCausalLM",
        ("llama", "mistral"),
        _LLAMA,
        KEYS,
        biases={"attn_q": "attention_bias", "ffn_up": "mlp_bias"},
        interleaved=True,
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", ("qwen2",), _LLAMA, KEYS),
    Architecture("qwen3", "Qwen3ForCausalLM", ("qwen3",), _LLAMA, KEYS),
    Architecture(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        ("qwen2_moe",),
        {**_QWEN_MOE, **_SHARED_EXPERT},
        {
            **_QWEN_MOE_KEYS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        experts=_QWEN_EXPERTS,
        fixed={"norm_topk_prob": False},
        biases={"attn_q": "qkv_bias"},
        own_head=True,
    ),
    Architecture(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        ("qwen3_moe",),
        _QWEN_MOE,
        _QWEN_MOE_KEYS,
        experts=_QWEN_EXPERTS,
        fixed={"norm_topk_prob": True},
    ),
    Architecture(
        "phi3",
        "Phi3ForCausalLM",
        ("phi3",),
        _PHI3,
        {**KEYS, **_WINDOW},
        # without it, llama.cpp before June 2025 takes a window that it guesses
        absent={"attention.sliding_window": 0},
        part="partial_rotary_factor",
    ),
    Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        ("gemma2",),
        _GEMMA,
        {**KEYS, **_WINDOW, **CAPS},
        norm_offset=1.0,
        widest=46,
    ),
    Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        ("gemma3_text",),
        _GEMMA,
        {**KEYS, **_WINDOW},
        norm_offset=1.0,
        widest=62,
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        ("gpt2",),
        _GPT2,
        _GPT2_KEYS,
        top=_GPT2_TOP,
        blocks="transformer.h",
        written=(),
        in_out=True,
    ),
    Architecture(
        "gptneox",
        "GPTNeoXForCausalLM",
        ("gpt_neox",),
        _NEOX,
        _NEOX_KEYS,
        top=_NEOX_TOP,
        blocks="gpt_neox.layers",
        written=("rope.dimension_count",),
        part="rotary_pct",
        own_head=True,
        fused="query_key_value",
    ),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        ("bloom",),
        _BLOOM,
        _BLOOM_KEYS,
        top=_BLOOM_TOP,
        blocks="transformer.h",
        written=("feed_forward_length", "attention.head_count_kv"),
        fused="query_key_value",
    ),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        ("falcon",),
        _FALCON_40B,
        _FALCON_KEYS,
        sign="blk.0.attn_norm_2.weight",
        top=_FALCON_TOP,
        blocks="transformer.h",
        written=("rope.dimension_count",),
        constants={"tensor_data_layout": "jploski"},
        fixed={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        fused="query_key_value",
    ),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        ("falcon",),
        _FALCON_7B,
        _FALCON_KEYS,
        top=_FALCON_TOP,
        blocks="transformer.h",
        written=("rope.dimension_count",),
        constants={"tensor_data_layout": "jploski"},
        fixed={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        fused="query_key_value",
    ),
    # how token vectors become one is left to the folder
    Architecture(
        "bert",
        "BertModel",
        ("bert",),
        _BERT,
        {**_SIZES, "attention.layer_norm_epsilon": "layer_norm_eps"},
        top=_BERT_TOP,
        blocks="bert.encoder.layer",
        written=(),
        constants={"attention.causal": False},
        rows={"token_types": "type_vocab_size"},
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        ("t5",),
        {},
        _T5_KEYS,
        sign="enc.blk.0.ffn_gate.weight",
        top=_T5_TOP,
        two=_t5(ffn_gate="wi_0", ffn_up="wi_1", ffn_down="wo"),
        written=_T5_WRITTEN,
        fixed={"feed_forward_proj": "gated-gelu", "is_encoder_decoder": True},
        own_head=True,
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        ("t5",),
        {},
        _T5_KEYS,
        top=_T5_TOP,
        two=_t5(ffn_up="wi", ffn_down="wo"),
        written=_T5_WRITTEN,
        fixed={"feed_forward_proj": "relu", "is_encoder_decoder": True},
        own_head=True,
    ),
)
NAMES = tuple(dict.fromkeys(row.gguf for row in ARCHITECTURES))
