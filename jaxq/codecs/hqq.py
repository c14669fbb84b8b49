"""HQQ checkpoints: ``w = (q − zero) · scale`` with float zero points.

The matrix is reshaped to ``[rows, group]`` (axis 1) or ``[group, columns]`` (axis 0,
whose groups are strided) and packed by slices of its rows. Axis 1 is a `QTensor`: a
zero point that is no integer is held as the offset ``−zero · scale``, which is exact in
float32, so that ``w`` is rounded once, where HQQ rounds the difference and the product.
Axis 0 is dequantized as HQQ does it.

Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.base import Dense
from jaxq.codecs.gptq import assemble
from jaxq.codecs.source import Source, check, need, parts_of, scalar
from jaxq.codecs.unpacked import Unpacked

# packing -> (slices per item, bits between them, dtype)
PACKINGS = {
    "8bit_u8": (1, 8, "U8"),
    "4bit_u8": (2, 4, "U8"),
    "3bit_32": (10, 3, "I32"),
    "2bit_u8": (4, 2, "U8"),
    "1bit_u8": (8, 1, "U8"),
}
DTYPES = {
    "torch.float16": np.dtype("float16"),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.float32": np.dtype("float32"),
}
SUFFIXES = (
    *("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing"),
    *("compute_dtype", "view_as_float", "quant_scale", "quant_zero", "channel_wise"),
    *("encoded_state_dict", "offload_meta", "optimize", "round_zero"),
    *("stores_quant_config", "unpack_view_dtype"),
)
WORD = 40


@dataclasses.dataclass(frozen=True)
class HQQReader:
    """Reads HQQ layers, whose tensors say everything about them."""

    source: Source

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer."""
        return parts_of(self.source, module, SUFFIXES, sign="W_q")

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked | Dense:
        """Return a layer, its codes as they are where a `QTensor` holds them."""
        self._refuse(module)
        stored = need(self.source, f"{module}.shape", ("I64", "I32"), (2,))
        if tuple(stored.tolist()) != shape:
            raise CheckpointError(
                f"{self.source.where(f'{module}.shape')} is {stored.tolist()}; "
                f"config.json makes the layer {list(shape)}"
            )
        bits = self._number(module, "nbits", (1, 2, 3, 4, 5, 6, 8))
        axis = self._number(module, "axis", (0, 1))
        count = math.prod(shape)
        group = int(scalar(self.source, f"{module}.group_size", ("I32", "I64")))
        if group < 1 or count % group:
            raise CheckpointError(
                f"{self.source.where(f'{module}.group_size')} is {group}, which does "
                f"not divide the {count} weights of {list(shape)}"
            )
        groups = count // group
        grid = (groups, group) if axis else (group, groups)
        codes = self._codes(module, grid, bits)
        line = (groups, 1) if axis else (1, groups)
        dtype = DTYPES[self._word(module, "compute_dtype", DTYPES)]
        kind = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype.name]
        scale = need(self.source, f"{module}.scale", (kind,), line)
        zero = need(self.source, f"{module}.zero", (kind,), line)
        if axis and bits > 1 and shape[1] % group == 0:
            rows = (shape[0], shape[1] // group)
            lines = scale.reshape(rows).T, zero.reshape(rows).T
            return _matrix(codes.reshape(shape).T, *lines, bits, group)
        wide = codes - zero.astype(np.float32)
        values = (wide.astype(dtype) * scale).astype(dtype)
        why = "its groups run across rows" if axis else "its groups are strided"
        return Dense(values.reshape(shape), "it has 1 bit" if bits == 1 else why)

    def unused(self) -> Mapping[str, str]:
        """Nothing is left unread."""
        return {}

    def _codes(self, module: str, grid: tuple[int, int], bits: int) -> np.ndarray:
        """Return the codes ``uint8[grid]``: slices of rows, the first on top."""
        packing = self._word(module, "packing", PACKINGS)
        slices, step, dtype = PACKINGS[packing]
        if bits > step:
            raise CheckpointError(
                f"{module}: {bits} bits do not fit the packing {packing!r}"
            )
        rows = -(-grid[0] // slices)
        packed = need(self.source, f"{module}.W_q", (dtype,), (rows, grid[1]))
        packed = packed.view(np.uint32 if dtype == "I32" else np.uint8)
        top = step * (slices - 1)
        parts = [
            ((packed >> packed.dtype.type(top - step * i)) & (2**step - 1))
            for i in range(slices)
        ]
        return np.concatenate(parts)[: grid[0]].astype(np.uint8)

    def _refuse(self, module: str) -> None:
        for suffix in ("view_as_float", "quant_scale", "quant_zero"):
            name = f"{module}.{suffix}"
            if name in self.source and scalar(self.source, name, ("U8", "BOOL")):
                raise UnsupportedError(
                    f"{self.source.where(name)} is set, which is not implemented: "
                    "save the model with plain scales and zero points"
                )

    def _number(self, module: str, key: str, allowed: tuple[int, ...]) -> int:
        name = f"{module}.{key}"
        value = int(scalar(self.source, name, ("I32", "I64")))
        if value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise CheckpointError(
                f"{self.source.where(name)} is {value}; it must be one of {listed}"
            )
        return value

    def _word(self, module: str, key: str, allowed: Mapping[str, Any]) -> str:
        name = f"{module}.{key}"
        check(self.source, name, ("U8",))
        if math.prod(self.source.entry(name)[1]) > WORD:
            raise CheckpointError(f"{self.source.where(name)} is too long a word")
        word = self.source.read(name).tobytes().decode("ascii", "replace")
        if word not in allowed:
            raise CheckpointError(
                f"{self.source.where(name)} says {word!a}; it must be one of "
                f"{', '.join(allowed)}"
            )
        return word


def _matrix(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, group: int
) -> Unpacked:
    """Return codes ``[in, out]`` with scales and zero points ``[groups, out]``."""
    wide = zeros.astype(np.float32)
    if (wide == np.rint(wide)).all() and 0 <= wide.min() <= wide.max() < 256:
        return assemble(codes, scales, wide.astype(np.uint8), bits, group)
    plain = assemble(codes, scales, np.zeros(zeros.shape, np.uint8), bits, group)
    spec = dataclasses.replace(plain.spec, symmetric=True)
    offset = -wide * scales.astype(np.float32)
    return dataclasses.replace(plain, spec=spec, zeros=None, offset=offset)


def read(config: Mapping[str, Any], source: Source) -> HQQReader:
    """Return the reader of an HQQ checkpoint; its config says nothing more."""
    del config
    return HQQReader(source)
