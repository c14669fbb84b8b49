"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and windows."""

from jaxq.models.hf_config import Keys
from jaxq.models.layer_types import read_windows
from jaxq.models.llama import LlamaConfig, read_llama_shape, with_rope


def read_qwen2(keys: Keys) -> LlamaConfig:
    """Read the config of a Qwen2.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    shape = with_rope(keys, read_llama_shape(keys))
    windows = read_qwen_windows(keys, shape["num_layers"])
    return LlamaConfig(**shape, qkv_bias=True, windows=windows)


def read_qwen_windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Read which layers see a window: a list of them, or all from a layer on."""
    keys.require("use_mrope", False)
    window = keys.given("sliding_window")
    if not keys.flag("use_sliding_window"):
        window = None
    first = keys.get("max_window_layers")
    return read_windows(keys, layers, window, [i >= first for i in range(layers)])
