"""AutoRound checkpoints: the layouts of GPTQ or AWQ, with settings per layer.

Cheng et al. 2023, https://arxiv.org/abs/2309.05516.
"""

from collections.abc import Mapping
from typing import Any

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import awq, settings
from jaxq.codecs.base import Reader
from jaxq.codecs.gptq import GPTQReader, Layer, layers, override_layer
from jaxq.codecs.source import Source

# packing_format -> how GPTQ's zero points are stored, or "awq"
PACKINGS = {
    "auto_round:auto_gptq": "v1",
    "auto_round:gptq": "v1",
    "auto_round": "v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


def read(config: Mapping[str, Any], source: Source) -> Reader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``auto-round``.

    Raises:
        CheckpointError: the config is damaged.
        UnsupportedError: the packing is one that is not known.
    """
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise UnsupportedError(
            f"quantization_config: packing_format is {shorten(packing)}; known are "
            f"{', '.join(PACKINGS)}"
        )
    if PACKINGS[packing] == "awq":
        return awq.read({**config, "version": "gemm"}, source)
    usual = layers(config)
    extra = settings.section(config, "extra_config")

    def layer(module: str) -> Layer | None:
        found = usual(module)
        override = extra.get(module)
        if override is None or found is None:
            return found
        if isinstance(override, dict) and override.get("bits", 0) == 16:
            return None
        return override_layer(found, override)

    return GPTQReader(source, layer, PACKINGS[packing])
