"""Read which layers see a window and which see everything."""

from collections.abc import Sequence
from typing import Any

from jaxq.models.hf_config import ConfigError, Keys

KINDS = {"full_attention": False, "sliding_attention": True}


def read_windows(
    keys: Keys, layers: int, window: int | None, slides: Sequence[bool]
) -> tuple[int | None, ...]:
    """Return the window of every layer; empty where no layer has one.

    Args:
        keys: the config, whose `layer_types` has the first word.
        layers: how many there are.
        window: how many tokens back the layers that slide see, or None.
        slides: which layers slide, where `layer_types` is missing.

    Raises:
        ConfigError: `layer_types` is none of the known for every layer.
    """
    kinds: Any = keys.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or not set(kinds) <= set(KINDS):
            raise ConfigError(
                f"config.json: layer_types is {kinds!r}; it must name one of "
                f"{', '.join(KINDS)} for each of the {layers} layers"
            )
        slides = [KINDS[kind] for kind in kinds]
    if window is None or not any(slides):
        return ()
    return tuple(window if slide else None for slide in slides)
