"""Qwen2-MoE: Qwen2 with experts, and one expert that every token goes to."""

from jaxq.models.experts import ExpertsConfig, read_experts
from jaxq.models.hf_config import Keys
from jaxq.models.layer_types import read_windows
from jaxq.models.llama import read_llama_shape, with_rope


def read_qwen2_moe(keys: Keys) -> ExpertsConfig:
    """Read the config of a Qwen2-MoE.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    shape = with_rope(keys, read_llama_shape(keys))
    layers = shape["num_layers"]
    window = keys.get("sliding_window")  # written as 0 where it is not used
    window = window if keys.flag("use_sliding_window") else None
    first = keys.get("max_window_layers")
    every_other = [i % 2 == 0 and i < first for i in range(layers)]
    return ExpertsConfig(
        **shape,
        **read_experts(keys, "num_experts", layers),
        shared_size=keys.size("shared_expert_intermediate_size"),
        qkv_bias=keys.flag("qkv_bias"),
        windows=read_windows(keys, layers, window, every_other),
    )
