"""fp8 checkpoints of DeepSeek-V3, Qwen3 and transformers' FineGrainedFP8Config.

``weight`` is float8_e4m3fn ``[out, in]``, ``weight_scale_inv`` one number per tile of
(mostly) 128 x 128; it multiplies, whatever its name says. Tiles start at multiples of
their size, so the last ones may be partial. DeepSeek-AI 2024, arXiv:2412.19437, 3.3.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import settings
from jaxq.codecs.floats import BFLOAT16, e8m0_patterns, float_matrix
from jaxq.codecs.source import Source, check, need
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec

SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SUFFIXES = ("weight", "weight_scale_inv", "weight_scale", "activation_scale")


@dataclasses.dataclass(frozen=True)
class FP8Reader:
    """Reads fp8 layers.

    Attributes:
        source: the tensors.
        tile: ``(out, in)`` that share a scale, or None: all.
        static: whether layers have a scale for their input.
    """

    source: Source
    tile: tuple[int, int] | None
    static: bool

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer whose weight is fp8.

        transformers leaves a scale that was never set beside weights that it could not
        tile; those are floats.
        """
        name = f"{module}.weight"
        if name not in self.source or self.source.entry(name)[0] != "F8_E4M3":
            return ()
        names = (f"{module}.{suffix}" for suffix in SUFFIXES)
        return tuple(name for name in names if name in self.source)

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked:
        """Return a layer's codes and scales as they are."""
        columns, rows = shape
        tile = shape if self.tile is None else self.tile
        block = min(tile[1], rows), min(tile[0], columns)
        codes = need(self.source, f"{module}.weight", ("F8_E4M3",), shape)
        name = f"{module}.weight_scale_inv"
        if name not in self.source:
            name = f"{module}.weight_scale"
        grid = -(-columns // block[1]), -(-rows // block[0])
        flat = ((), (1,)) if grid == (1, 1) else ()
        check(self.source, name, (*SCALES, "U8", "F8_E8M0"), grid, *flat)
        dtype = self.source.entry(name)[0]
        scales = self.source.read(name)
        if dtype not in SCALES:
            scales = e8m0_patterns(scales)
        scales = scales.reshape(grid).T
        kind = SCALES.get(dtype, "e8m0")
        w = float_matrix(codes.T, scales, kind, block, BFLOAT16)
        return self._with_activation(w, module)

    def unused(self) -> Mapping[str, str]:
        """Return what transformers leaves beside float weights."""
        return {"weight_scale_inv": "the weight beside it is no fp8"}

    def _with_activation(self, w: Unpacked, module: str) -> Unpacked:
        group = "token" if self.tile is None else min(self.tile[1], w.shape[0])
        name = f"{module}.activation_scale"
        if not self.static or name not in self.source:
            return dataclasses.replace(w, activation=QuantSpec("fp8_e4m3", group))
        scale = need(self.source, name, tuple(SCALES), (), (1,))
        return dataclasses.replace(
            w,
            activation=QuantSpec("fp8_e4m3", "tensor"),
            activation_scale=scale.astype(np.float32).reshape(1, 1),
        )


def read(config: Mapping[str, Any], source: Source) -> FP8Reader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``fp8``.

    Raises:
        CheckpointError: the config is damaged.
    """
    tile = config.get("weight_block_size")
    sizes = isinstance(tile, list) and len(tile) == 2
    if tile is not None and not (
        sizes and all(type(n) is int and 0 < n < 2**31 for n in tile)
    ):
        raise CheckpointError(
            f"quantization_config: weight_block_size is {shorten(tile)}; it must be "
            "two positive sizes, [out, in], or null"
        )
    settings.choice(config, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    scheme = settings.choice(
        config, "activation_scheme", ("dynamic", "static"), "dynamic"
    )
    return FP8Reader(source, tuple(tile) if tile else None, scheme == "static")
