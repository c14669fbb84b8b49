"""What llama.cpp takes for granted of Gemma, and no GGUF file says."""

from collections.abc import Mapping
from typing import Any

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.gguf_architectures import CAPS, Architecture

USUAL_PATTERN = 6  # of Gemma 3: which layer of so many sees everything


def query_scalar(row: Architecture, layers: int, widths: tuple[int, int]) -> int:
    """Return ``query_pre_attn_scalar`` as llama.cpp has it.

    Args:
        row: of a Gemma.
        layers: of the model.
        widths: of a head, and of the stream divided by the number of heads.
    """
    return widths[1] if layers == row.widest else widths[0]


def refuse_other_gemmas(row: Architecture, config: Mapping[str, Any]) -> None:
    """Raise where llama.cpp would take something else for what no file says.

    Args:
        row: of a Gemma.
        config: Hugging Face's, complete.

    Raises:
        UnsupportedError: it says which setting.
    """
    keys = row.keys.values()
    off = [key for key in (*CAPS.values(), "sliding_window") if key in keys]
    off = [key for key in off if key in config and config[key] is None]
    if off:
        raise UnsupportedError(
            f"GGUF cannot say that {off[0]} is null: where a file has no number "
            "llama.cpp takes Gemma's own"
        )
    lost = [key for key in CAPS.values() if config.get(key) and key not in keys]
    if lost:
        raise UnsupportedError(
            f"GGUF has no {lost[0]} for a {row.model_types[0]} model, and its config "
            f"sets {config[lost[0]]}"
        )
    wide = config["hidden_size"] // config["num_attention_heads"]
    widths = (config.get("head_dim") or wide, wide)
    wanted = query_scalar(row, config["num_hidden_layers"], widths)
    if config.get("query_pre_attn_scalar", wanted) != wanted:
        raise UnsupportedError(
            f"GGUF cannot say query_pre_attn_scalar: llama.cpp takes {wanted} for such "
            f"a model, and it is {config['query_pre_attn_scalar']}"
        )
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = config.get("rope_local_base_freq", local.get("rope_theta", 10_000.0))
    pattern = config.get("sliding_window_pattern") or config.get(
        "_sliding_window_pattern", USUAL_PATTERN
    )
    if theta != 10_000.0 or pattern != USUAL_PATTERN or _odd_layers(row, config):
        raise UnsupportedError(
            "GGUF cannot say which layers slide, nor how their rotary angles turn: "
            "llama.cpp takes what Gemma has, and it is something else"
        )


def _odd_layers(row: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the layers that slide are others than Gemma's."""
    every = USUAL_PATTERN if row.gguf == "gemma3" else 2
    found = config.get("layer_types")
    words = ("full_attention", "sliding_attention")
    return found is not None and list(found) != [
        words[bool((i + 1) % every)] for i in range(len(found))
    ]
