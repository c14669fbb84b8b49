"""NVIDIA ModelOpt checkpoints: fp8 per tensor, and nvfp4.

fp8: ``weight`` float8_e4m3fn, ``weight_scale`` and ``input_scale`` float32 scalars.
nvfp4: ``weight`` uint8 ``[out, in / 2]``, ``weight_scale`` float8_e4m3fn of 16 channels
each, times ``weight_scale_2``, a float32 scalar; ``input_scale`` multiplies the float8
scales that blocks of 16 of the input are given when it runs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.codecs import settings
from jaxq.codecs.floats import BFLOAT16, float_matrix, fp4_matrix, small_scales
from jaxq.codecs.source import Source, need, parts_of, scalar
from jaxq.codecs.unpacked import Unpacked
from jaxq.codecs.words import nibbles
from jaxq.spec import QuantSpec

SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
UNUSED = {
    **dict.fromkeys(("k_scale", "v_scale"), "the cache stays float"),
    **dict.fromkeys(("output_scale",), "outputs stay float"),
}


@dataclasses.dataclass(frozen=True)
class ModelOptReader:
    """Reads ModelOpt layers, whose tensors say which kind they are."""

    source: Source

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer."""
        return parts_of(self.source, module, SUFFIXES, sign="weight_scale")

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked:
        """Return a layer's codes and scales as they are."""
        columns, rows = shape
        name = f"{module}.weight"
        if f"{name}_scale_2" in self.source:
            if rows % 16:
                raise CheckpointError(
                    f"{self.source.where(name)}: {rows} input channels are no whole "
                    "groups of 16"
                )
            packed = need(self.source, name, ("U8",), (columns, rows // 2))
            grid = columns, rows // 16
            scales = need(self.source, f"{name}_scale", ("F8_E4M3",), grid)
            world = scalar(self.source, f"{name}_scale_2", ("F32",))
            w = fp4_matrix(nibbles(packed).T, scales.T, world.reshape(1, 1))
            spec = QuantSpec("fp4_e2m1", 16, scale=small_scales(divides=False))
            return self._with_activation(w, module, spec)
        codes = need(self.source, name, ("F8_E4M3",), shape)
        scale = scalar(self.source, f"{name}_scale", ("F32",)).reshape(1, 1)
        w = float_matrix(codes.T, scale, "float32", (rows, columns), BFLOAT16)
        return self._with_activation(w, module, QuantSpec("fp8_e4m3", "tensor"))

    def _with_activation(self, w: Unpacked, module: str, spec: QuantSpec) -> Unpacked:
        """Add how the input is quantized; without a scale for it, it stays float."""
        name = f"{module}.input_scale"
        if name not in self.source:
            return w
        scale = np.asarray(scalar(self.source, name, ("F32",)), np.float32)
        return dataclasses.replace(
            w, activation=spec, activation_scale=scale.reshape(1, 1)
        )

    def unused(self) -> Mapping[str, str]:
        """Return what is known and not read."""
        return UNUSED


def read(config: Mapping[str, Any], source: Source) -> ModelOptReader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``modelopt``.

    Raises:
        CheckpointError: the algorithm is none that is known.
    """
    settings.choice(config, "quant_algo", ("nvfp4", "fp8"))
    return ModelOptReader(source)
