"""Qwen3: Llama with norms over query and key heads, and windows."""

from jaxq.models.hf_config import Keys
from jaxq.models.llama import LlamaConfig, read_llama_shape, with_rope
from jaxq.models.qwen2 import read_qwen_windows


def read_qwen3(keys: Keys) -> LlamaConfig:
    """Read the config of a Qwen3.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    bias = keys.flag("attention_bias")
    shape = with_rope(keys, read_llama_shape(keys))
    return LlamaConfig(
        **shape,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=read_qwen_windows(keys, shape["num_layers"]),
    )
