"""AWQ checkpoints (AutoAWQ, GPTQModel, llm-awq): gemm, gemv and gemv_fast, 4 bits.

gemm: ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``,
``scales`` ``[groups, out]``, eight columns to a word in the order `ORDER`. gemv:
``[out, in / 8]`` in natural order, groups padded. gemv_fast: int16, interleaved, and
float zero points ``−s · z`` that are rounded, so no `QTensor` holds them.

Lin et al. 2023, https://arxiv.org/abs/2306.00978.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.codecs import settings
from jaxq.codecs.base import Dense
from jaxq.codecs.gptq import SCALES, assemble
from jaxq.codecs.source import Source, check, parts_of
from jaxq.codecs.unpacked import Unpacked
from jaxq.codecs.words import unpack_stream

# Nibble i of a word holds column ORDER[i] of its eight, and column c sits in PLACE[c].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")


@dataclasses.dataclass(frozen=True)
class AWQReader:
    """Reads AWQ layers.

    Attributes:
        source: the tensors.
        group: channels per scale; -1: all.
        version: the layout, of `VERSIONS`.
    """

    source: Source
    group: int
    version: str

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer."""
        return parts_of(self.source, module, SUFFIXES, sign="qweight")

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked | Dense:
        """Return a layer's codes, scales and zero points as they are."""
        columns, rows = shape
        group = rows if self.group == -1 else min(self.group, rows)
        if rows % group or rows % 8 or columns % 8:
            raise CheckpointError(
                f"{self.source.where(f'{module}.qweight')}: AWQ needs sizes that are "
                f"multiples of 8 and whole groups, but the layer is {rows} to "
                f"{columns} in groups of {group}; is group_size of another model?"
            )
        if self.version == "gemm":
            return self._gemm(module, rows, columns, group)
        if self.version == "gemv":
            return self._gemv(module, rows, columns, group)
        return self._fast(module, rows, columns, group)

    def unused(self) -> Mapping[str, str]:
        """Nothing is left unread."""
        return {}

    def _gemm(self, module: str, rows: int, columns: int, group: int) -> Unpacked:
        groups = rows // group
        self._check(module, (rows, columns // 8), (groups, columns // 8))
        check(self.source, f"{module}.scales", tuple(SCALES), (groups, columns))
        codes = self.source.read(f"{module}.qweight")
        zeros = self.source.read(f"{module}.qzeros")
        return assemble(
            ordered(unpack_stream(codes, 4, 1, columns)),
            self.source.read(f"{module}.scales"),
            ordered(unpack_stream(zeros, 4, 1, columns)),
            bits=4,
            group=group,
        )

    def _gemv(self, module: str, rows: int, columns: int, group: int) -> Unpacked:
        width = padded_words(rows // group, group)
        self._check(module, (columns, rows // 8), (columns, width))
        check(self.source, f"{module}.scales", tuple(SCALES), (columns, 8 * width))
        groups = rows // group
        zeros = unpack_stream(self.source.read(f"{module}.qzeros"), 4, 1, groups)
        scales = self.source.read(f"{module}.scales")[:, :groups]
        codes = unpack_stream(self.source.read(f"{module}.qweight"), 4, 1, rows)
        return assemble(codes.T, scales.T, zeros.T, bits=4, group=group)

    def _fast(self, module: str, rows: int, columns: int, group: int) -> Dense:
        if rows % 64 or columns % 4:
            raise CheckpointError(
                f"{self.source.where(f'{module}.qweight')}: {self.version} needs "
                f"inputs in multiples of 64 and outputs of 4, but the layer is {rows} "
                f"to {columns}"
            )
        groups, padded = rows // group, 8 * padded_words(rows // group, group)
        check(self.source, f"{module}.qweight", ("I16",), (columns // 4, rows))
        for name in ("qzeros", "scales"):
            check(self.source, f"{module}.{name}", ("F16", "BF16"), (padded, columns))
        words = self.source.read(f"{module}.qweight")
        scales = self.source.read(f"{module}.scales")
        offset = self.source.read(f"{module}.qzeros")[:groups].astype(np.float32)
        wide = scales[:groups].astype(np.float32)
        codes = interleaved(words, rows, columns).astype(np.float32)
        codes = codes.T.reshape(groups, group, columns)
        values = codes * wide[:, None] + offset[:, None]
        return Dense(
            values.reshape(rows, columns).astype(scales.dtype).T,
            f"{self.version} stores zero points as rounded floats",
        )

    def _check(
        self, module: str, codes: tuple[int, int], zeros: tuple[int, int]
    ) -> None:
        check(self.source, f"{module}.qweight", ("I32",), codes)
        check(self.source, f"{module}.qzeros", ("I32",), zeros)


def ordered(codes: np.ndarray) -> np.ndarray:
    """Return columns in their order, from that of gemm's words."""
    eights = codes.reshape(len(codes), -1, 8)
    return eights[:, :, PLACE].reshape(codes.shape)


def padded_words(groups: int, group: int) -> int:
    """Return the words of zero points in a row of gemv: padded for its kernel."""
    unit = 1 if group >= 128 else {64: 2, 32: 4}.get(group, 1)
    words = -(-groups // 8)
    return -(-words // unit) * unit


def interleaved(words: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the codes ``uint8[out, in]`` of gemv_fast's int16 ``[out / 4, in]``.

    Four rows take turns over tiles of 64 columns. In a tile of 32 the order is that of
    a 4 x 4 x 2 view with its first axes exchanged, then `ORDER` within eight.
    """
    wide = words.view(np.uint16)
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    codes = ((wide[..., None] >> shifts) & 15).astype(np.uint8)
    tiles = codes.reshape(columns // 4, rows // 64, 4, 64)
    codes = tiles.transpose(0, 2, 1, 3).reshape(columns, -1, 4, 8)
    undone = codes[..., list(np.argsort(ORDER))].reshape(columns, -1, 4, 4, 2)
    return undone.transpose(0, 1, 3, 2, 4).reshape(columns, rows)


def read(config: Mapping[str, Any], source: Source) -> AWQReader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``awq``.

    Raises:
        CheckpointError: the config is damaged, or asks for other than 4 bits.
    """
    spelt = {"w_bit": "bits", "q_group_size": "group_size"}
    config = {spelt.get(key, key): value for key, value in config.items()}
    settings.integer(config, "bits", (4,), 4)
    group = settings.integer(config, "group_size", range(-1, 2**31), 128)
    if group == 0:
        raise CheckpointError(
            "quantization_config: 'group_size' is 0; it must be a positive number, or "
            "-1 for one group"
        )
    given = config.get("version") or config.get("format") or "gemm"
    version = settings.choice({"version": given}, "version", VERSIONS)
    return AWQReader(source, group, version)
