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
# Hugging Face's key -> GGUF's, and what kind of number
KEYS = {
    "num_hidden_layers": ("block_count", int),
    "max_position_embeddings": ("context_length", int),
    "hidden_size": ("embedding_length", int),
    "intermediate_size": ("feed_forward_length", int),
    "num_attention_heads": ("attention.head_count", int),
    "num_key_value_heads": ("attention.head_count_kv", int),
    "head_dim": ("attention.key_length", int),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", float),
    "rope_theta": ("rope.freq_base", float),
}
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")
_WINDOW = {"sliding_window": ("attention.sliding_window", int)}
CAPS = {
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}
# Tables of rotary factors, which a config says as well.
ROTARY = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One value of ``general.architecture``.

    Attributes:
        name: Hugging Face's class.
        model_type: as its config has it.
        layer: GGUF's names in a block -> Hugging Face's.
        extra: settings that only this one has, like `KEYS`; each may be missing.
        interleaved: whether the rotary halves of query and key rows are.
        norm_offset: what norms' weights hold more than Hugging Face's.
        widest: blocks of the model whose queries llama.cpp scales by the width of all
            heads together, instead of by ``head_dim``; None: no setting says so.
        theta: the base of rotary angles where Hugging Face's config has none.
    """

    name: str
    model_type: str
    layer: Mapping[str, str]
    extra: Mapping[str, tuple[str, type]] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    widest: int | None = None
    theta: float = 10_000.0

    @property
    def keys(self) -> dict[str, tuple[str, type]]:
        """All settings that are numbers."""
        return {**KEYS, **self.extra}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", _LLAMA, interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _LLAMA),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _LLAMA),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _PHI3, _WINDOW),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA,
        {**_WINDOW, **CAPS},
        norm_offset=1.0,
        widest=46,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA,
        _WINDOW,
        norm_offset=1.0,
        widest=62,
        theta=1_000_000.0,
    ),
}


def query_scalar(architecture: Architecture, config: Mapping[str, object]) -> int:
    """Return ``query_pre_attn_scalar`` as llama.cpp has it, which no file says."""
    heads, width = (
        int(str(config["num_attention_heads"])),
        int(str(config["hidden_size"])),
    )
    if config["num_hidden_layers"] == architecture.widest or "head_dim" not in config:
        return width // heads
    return int(str(config["head_dim"]))
