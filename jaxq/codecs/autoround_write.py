"""Write AutoRound checkpoints: GPTQ's layout without ``g_idx``, settings by layer.

Symmetric layers are stored with zero points less one (``auto_round:auto_gptq``), which
is what its kernels take of those; others with zero points as they are (``auto_round``).
"""

from typing import Any

import numpy as np

from jaxq.codecs.gptq_write import GPTQWriter, Written
from jaxq.codecs.integers import refuse_order
from jaxq.codecs.unpacked import Unpacked

FLOAT_BITS = 16  # what it calls a layer that stays float


class AutoRoundWriter(GPTQWriter):
    """Writes GPTQ layers, and describes them as AutoRound does."""

    def write(self, module: str, w: Unpacked) -> tuple[dict[str, np.ndarray], str]:
        """Return the tensors of a layer, zero points as they are, and a note."""
        refuse_order(w)
        tensors, note = super().write(module, w)
        del tensors[f"{module}.g_idx"]
        return tensors, note

    @property
    def less_one(self) -> bool:
        """Whether zero points are stored less one: where every layer is symmetric."""
        return all(layer.symmetric for layer in self.layers.values())

    def config(self) -> dict[str, Any]:
        """Return the quantization config: what most layers have, and others by name."""
        usual, others = self.usual()
        inner = {name: layer for name, layer in self.layers.items() if _block(name)}
        extra: dict[str, Any] = {
            name: {"bits": FLOAT_BITS} for name in self.floats if _block(name)
        }
        outside = {n: layer for n, layer in self.layers.items() if n not in inner}
        extra |= {name: _settings(layer) for name, layer in (outside | others).items()}
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq" if self.less_one else "auto_round",
            "data_type": "int",
            **_settings(usual),
            "block_name_to_quantize": ",".join(sorted({_block(n) for n in inner})),
            **({"extra_config": extra} if extra else {}),
        }


def _settings(layer: Written) -> dict[str, Any]:
    return {
        "bits": layer.bits,
        "group_size": layer.group,
        "sym": layer.symmetric,
        "data_type": "int",
    }


def _block(name: str) -> str:
    """Return the name of the list of blocks that a layer is in; empty: in none."""
    parts = name.split(".")
    numbers = (i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: next(numbers, 0)])
