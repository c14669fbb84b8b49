"""Mistral: Llama with a window, the same for all layers."""

from jaxq.models.hf_config import Keys
from jaxq.models.llama import LlamaConfig, read_llama_shape, with_rope


def read_mistral(keys: Keys) -> LlamaConfig:
    """Read the config of a Mistral.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    shape = with_rope(keys, read_llama_shape(keys))
    # Here a missing key means 4096 and a null means no window.
    window = keys.given("sliding_window")
    windows = () if window is None else (window,) * shape["num_layers"]
    return LlamaConfig(**shape, windows=windows)
