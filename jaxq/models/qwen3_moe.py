"""Qwen3-MoE: Qwen3 with experts."""

from jaxq.models.experts import ExpertsConfig, read_experts
from jaxq.models.hf_config import Keys
from jaxq.models.layer_types import read_windows
from jaxq.models.llama import read_llama_shape, with_rope


def read_qwen3_moe(keys: Keys) -> ExpertsConfig:
    """Read the config of a Qwen3-MoE.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    shape = with_rope(keys, read_llama_shape(keys))
    layers, bias = shape["num_layers"], keys.flag("attention_bias")
    window = keys.get("sliding_window")  # written as 0 where it is not used
    window = window if keys.flag("use_sliding_window") else None
    keys.get("max_window_layers")  # written, and without a meaning here
    # transformers 5 writes the number of experts under Mixtral's name
    renamed = keys.config.get("num_local_experts") is not None
    count = "num_local_experts" if renamed else "num_experts"
    return ExpertsConfig(
        **shape,
        **read_experts(keys, count, layers),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=read_windows(keys, layers, window, [True] * layers),
    )
