"""Write GPTQ checkpoints: v1, or v2 where a zero point is 0.

v1, which every engine reads, stores zero points less one. It has no 0: what writers
made of one differs, and damaged the fields beside it. v2 stores them as they are.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.base import Writer
from jaxq.codecs.gptq import BITS, ONES
from jaxq.codecs.integers import half_scales, integers_of, refuse_activation
from jaxq.codecs.unpacked import Unpacked
from jaxq.codecs.words import pack_stream, unpack_stream
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Written:
    """The settings of one layer that was written; a group of -1 is the whole input."""

    bits: int
    group: int
    symmetric: bool
    reordered: bool


# GPTQModel takes asymmetric v1 files only of writers that say they are this: no field
# of theirs borrows from the next, as fields of AutoGPTQ's zero points did.
SOUND_V1 = "gptqmodel:0.9.0"


class GPTQWriter(Writer):
    """Writes GPTQ layers, and remembers their settings for the config."""

    late = (".qzeros",)

    def __init__(self) -> None:
        self.layers: dict[str, Written] = {}
        self.rows: dict[str, int] = {}
        self.floats: list[str] = []
        self.has_zero = False  # among the zero points

    def write(self, module: str, w: Unpacked) -> tuple[dict[str, np.ndarray], str]:
        """Return the tensors of a layer, zero points as v2 has them, and a note."""
        found = integers_of(w)
        rows, columns = w.shape
        if found.bits not in BITS:
            raise UnsupportedError(
                f"GPTQ has 2, 3, 4 and 8 bits, and it has {found.bits}"
            )
        if rows % 32 or columns % 32:
            raise UnsupportedError(
                f"GPTQ needs sizes that are multiples of 32, and it is {rows} to "
                f"{columns}"
            )
        groups = np.arange(rows, dtype=np.int32) // found.group
        codes = found.codes
        if w.index is not None:
            back = np.argsort(w.index)
            codes, groups = codes[back], groups[back]
        tensors = {
            f"{module}.qweight": pack_stream(codes, found.bits, 0),
            f"{module}.qzeros": pack_stream(found.zeros, found.bits, 1),
            f"{module}.scales": half_scales(w, found.scales),
            f"{module}.g_idx": np.ascontiguousarray(groups),
        }
        group = -1 if found.group >= rows else found.group
        layer = Written(found.bits, group, found.symmetric, w.index is not None)
        self.layers[module], self.rows[module] = layer, rows
        self.has_zero |= bool((found.zeros == 0).any())
        return tensors, refuse_activation(w)

    def finish(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Return zero points as the version of the whole checkpoint has them."""
        if not self.less_one:
            return tensor
        return minus_one(tensor, self.layers[name.removesuffix(".qzeros")].bits)

    @property
    def less_one(self) -> bool:
        """Whether zero points are stored less one, as v1 has them."""
        return not self.has_zero

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize with: 4 bits, symmetric, groups of 128."""
        group = 128 if shape[0] % 128 == 0 else "channel"
        return QuantSpec("int4", group, grid="gptq", scale=_half(dtype))

    def config(self) -> dict[str, Any]:
        """Return the quantization config: what most layers have, and overrides."""
        usual, others = self.usual()
        layers = self.layers.values()
        dynamic: dict[str, Any] = {
            f"-:^{re.escape(name)}$": {} for name in self.floats if name != "lm_head"
        }
        dynamic |= {
            name if name == "lm_head" else f"+:^{re.escape(name)}$": {
                "bits": layer.bits,
                "group_size": layer.group,
                "sym": layer.symmetric,
                "desc_act": layer.reordered,
            }
            for name, layer in others.items()
        }
        stored = "gptq" if self.less_one else "gptq_v2"
        symmetric = all(layer.symmetric for layer in layers)
        sound = self.less_one and not symmetric
        return {
            "quant_method": "gptq",
            "bits": usual.bits,
            "group_size": usual.group,
            "sym": symmetric,
            "desc_act": any(layer.reordered for layer in layers),
            "lm_head": "lm_head" in self.layers,
            "checkpoint_format": stored,
            "format": stored,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["jaxq", SOUND_V1] if sound else ["jaxq"]},
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def usual(self) -> tuple[Written, dict[str, Written]]:
        """Return what most layers have, and the settings of the others by name.

        A layer of one group, as long as the others' groups are, counts as theirs.
        """
        sizes = {layer.group for layer in self.layers.values()}
        layers = {
            name: dataclasses.replace(layer, group=self.rows[name])
            if layer.group == -1 and self.rows[name] in sizes
            else layer
            for name, layer in self.layers.items()
        }
        counted = Counter(layer for name, layer in layers.items() if name != "lm_head")
        most = (counted or Counter(layers.values())).most_common(1)[0][0]
        return most, {name: layer for name, layer in layers.items() if layer != most}


def minus_one(words: np.ndarray, bits: int) -> np.ndarray:
    """Return zero points less one, as v1 has them: of words that fields fill, whole."""
    if bits in ONES:
        return (words.view(np.uint32) - np.uint32(ONES[bits])).view(np.int32)
    zeros = unpack_stream(words, bits, 1, words.shape[1] * 32 // bits)
    return pack_stream((zeros - np.uint8(1)) & np.uint8(2**bits - 1), bits, 1)


def _half(dtype: Any) -> str:
    return "bfloat16" if np.dtype(dtype).name == "bfloat16" else "float16"
