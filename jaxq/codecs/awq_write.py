"""Write AWQ checkpoints: the gemm layout, 4 bits, one group size for all layers."""

from typing import Any

import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.awq import ORDER
from jaxq.codecs.base import Writer
from jaxq.codecs.integers import (
    half_scales,
    integers_of,
    refuse_activation,
    refuse_order,
)
from jaxq.codecs.unpacked import Unpacked
from jaxq.codecs.words import pack_stream
from jaxq.spec import QuantSpec


class AWQWriter(Writer):
    """Writes AWQ layers."""

    def __init__(self) -> None:
        self.group: int | None = None  # of layers that have several
        self.whole: set[int] = set()  # lengths of layers that are one group
        self.floats: list[str] = []

    def write(self, module: str, w: Unpacked) -> tuple[dict[str, np.ndarray], str]:
        """Return the tensors of a layer, and a note."""
        found = integers_of(w)
        refuse_order(w)
        rows, columns = w.shape
        if found.bits != 4:
            raise UnsupportedError(f"AWQ has 4 bits, and it has {found.bits}")
        if columns % 32 or rows % found.group:
            raise UnsupportedError(
                f"AWQ needs outputs in multiples of 32 and whole groups, and it is "
                f"{rows} to {columns} in groups of {found.group}"
            )
        group = None if found.group >= rows else found.group
        whole = self.whole | ({rows} if group is None else set())
        if group and self.group not in (None, group):
            raise UnsupportedError(
                f"AWQ has one group size for all layers, {self.group} here, and it has "
                f"{group}"
            )
        group = self.group or group
        if group and whole - {group}:
            raise UnsupportedError(
                f"AWQ has one group size for all layers, {group} here, and another "
                f"layer is one group of {min(whole - {group})}"
            )
        tensors = {
            f"{module}.qweight": packed(found.codes),
            f"{module}.qzeros": packed(found.zeros),
            f"{module}.scales": half_scales(w, found.scales),
        }
        self.group, self.whole = group, whole
        return tensors, refuse_activation(w)

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize with: 4 bits, zero points, groups of 128."""
        del dtype
        usual = self.group or 128
        whole = shape[0] % usual or (self.whole and self.group is None)
        group = "channel" if whole else usual
        return QuantSpec("uint4", group, symmetric=False, scale="float16")

    def config(self) -> dict[str, Any]:
        """Return the quantization config."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(self.floats) or None,
        }


def packed(codes: np.ndarray) -> np.ndarray:
    """Return codes ``[rows, out]`` as int32 ``[rows, out / 8]`` in AWQ's order."""
    eights = codes.reshape(len(codes), -1, 8)[:, :, ORDER]
    return pack_stream(eights.reshape(codes.shape), 4, 1)
