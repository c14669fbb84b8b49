"""Write fp8 checkpoints in DeepSeek's and Qwen's form: tiles with a float32 scale."""

from typing import Any

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.base import Writer
from jaxq.codecs.integers import refuse_extras, refuse_order
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec

USUAL = 128


class FP8Writer(Writer):
    """Writes fp8 layers in tiles of one size."""

    def __init__(self) -> None:
        self.exact: list[int | None] = [None, None]  # along (in, out)
        self.least = [1, 1]
        self.floats: list[str] = []

    def write(self, module: str, w: Unpacked) -> tuple[dict[str, np.ndarray], str]:
        """Return the tensors of a layer, and a note."""
        refuse_extras(w)
        refuse_order(w)
        plain = w.spec.scale in ("float32", "bfloat16", "float16")
        if w.spec.format != "fp8_e4m3" or not plain or isinstance(w.scales, Unpacked):
            raise UnsupportedError(
                f"fp8 is fp8_e4m3 in tiles with float scales, and it is "
                f"{w.spec.describe()}"
            )
        if w.block[1] == 1 and w.shape[1] > 1:
            raise UnsupportedError(
                f"fp8 has scales of tiles such as {USUAL} x {USUAL}, and it has them "
                "per channel"
            )
        if not self._fits(w):
            raise UnsupportedError(
                f"fp8 has one size of tiles for all layers, {self.tile} here, and it "
                f"has {w.block}"
            )
        scales = np.ascontiguousarray(np.asarray(w.scales).T.astype(np.float32))
        codes = np.ascontiguousarray(w.codes.T).view(ml_dtypes.float8_e4m3fn)
        note = ""
        if w.activation is None:
            note = "engines quantize its activation to fp8; here it was float"
        return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}, note

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize with: tiles of 128 x 128."""
        del shape, dtype
        return QuantSpec("fp8_e4m3", self.tile)

    def config(self) -> dict[str, Any]:
        """Return the quantization config."""
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(self.tile[::-1]),
            "modules_to_not_convert": sorted(self.floats),
        }

    @property
    def tile(self) -> tuple[int, int]:
        """``(in, out)`` of a tile: as layers larger than it say, else as is usual."""
        rows, columns = (
            exact or max(least, USUAL)
            for exact, least in zip(self.exact, self.least, strict=True)
        )
        return rows, columns

    def _fits(self, w: Unpacked) -> bool:
        """Whether a layer's tiles are those of the others, cut at its edges.

        Along an axis that one tile covers, a layer only says that tiles are no smaller.
        """
        exact, least = list(self.exact), list(self.least)
        for i, (size, length) in enumerate(zip(w.block, w.shape, strict=True)):
            if size < length:
                exact[i] = exact[i] or size
                if exact[i] != size:
                    return False
            least[i] = max(least[i], min(size, length))
            if (exact[i] or least[i]) < least[i]:
                return False
        self.exact, self.least = exact, least
        return True
