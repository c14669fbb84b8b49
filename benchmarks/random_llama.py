"""The random Llama whose memory and blocks are measured."""

from typing import Any


def random_llama(
    layers: int, width: int, inner: int, vocabulary: int, dtype: str
) -> dict[str, Any]:
    """Return its config, as Hugging Face writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
