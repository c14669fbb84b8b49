"""Gemma 3, its text part: Gemma 2 with norms over heads; local layers turn faster."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxq.models.gemma2 import GemmaConfig, read_gemma_shape
from jaxq.models.hf_config import Keys
from jaxq.models.hf_rope import Usual, parse_rope
from jaxq.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(GemmaConfig):
    """The shape of a Gemma 3.

    Attributes:
        local_rope: the rotary angles of layers with a window.
    """

    local_rope: Rope

    def rope_of(self, layer: int) -> Rope:
        """Return the rotary angles of `layer`."""
        return self.rope if self.window(layer) is None else self.local_rope


def read_gemma3(keys: Keys) -> Gemma3Config:
    """Read the config of a Gemma 3.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    pattern = keys.get("_sliding_window_pattern")
    every = keys.size("sliding_window_pattern", 6 if pattern is None else pattern)
    shape = read_gemma_shape(keys, every)
    # transformers 5 writes both; 4 wrote the second as a number of its own
    written: Mapping[str, Any] = keys.get("rope_parameters") or {}
    old = keys.get("rope_scaling") or {}
    whole = written.get("full_attention") or old
    local = written.get("sliding_attention") or {}
    theta = keys.number("rope_theta", 1_000_000.0) or 1_000_000.0
    local_theta = keys.number("rope_local_base_freq", 10_000.0) or 10_000.0
    sizes = (shape["context"], shape["head_dim"])
    return Gemma3Config(
        **shape,
        qk_norm=True,
        rope=parse_rope(whole, *sizes, Usual(theta)),
        local_rope=parse_rope(local, *sizes, Usual(local_theta)),
    )
