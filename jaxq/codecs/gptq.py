"""GPTQ checkpoints (AutoGPTQ, GPTQModel): v1 and v2, 2, 3, 4 and 8 bits, act-order.

Every layer is ``qweight`` int32 ``[in · bits / 32, out]``, ``qzeros`` int32
``[groups, out · bits / 32]``, ``scales`` ``[groups, out]`` and mostly ``g_idx`` int32
``[in]``, the group of each row. Codes are unsigned, `w = (q − z) · s`. v2 stores z. v1
stores ``z − 1``, subtracted from the 32-bit word as a whole where fields fill words, so
that z = 0 borrows from the next field: it must be added back the same way.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import settings
from jaxq.codecs.base import Dense
from jaxq.codecs.source import Source, check, need, parts_of
from jaxq.codecs.unpacked import Unpacked, block_name
from jaxq.codecs.words import unpack_stream
from jaxq.spec import QuantSpec

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": "v1", "gptq_v2": "v2"}
SCALES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Set in every field of a word: what v1's zero points lack.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the config says of one layer; a group of -1 is the whole input."""

    bits: int
    group: int


@dataclasses.dataclass(frozen=True)
class GPTQReader:
    """Reads GPTQ layers.

    Attributes:
        source: the tensors.
        layer: what the config says of a module; None: that it is not quantized.
        zeros: how zero points are stored, ``"v1"`` (less one) or ``"v2"``.
    """

    source: Source
    layer: Callable[[str], Layer | None]
    zeros: str

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer."""
        return parts_of(self.source, module, SUFFIXES, sign="qweight")

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked | Dense:
        """Return a layer's codes, scales and zero points as they are."""
        columns, rows = shape
        layer = self.layer(module)
        if layer is None:
            raise CheckpointError(
                f"{self.source.where(f'{module}.qweight')} is quantized, but "
                "quantization_config says it is not; they are of different models"
            )
        bits = layer.bits
        group = rows if layer.group == -1 else min(layer.group, rows)
        groups = -(-rows // group)
        words = -(-rows * bits // 32), -(-columns * bits // 32)
        check(self.source, f"{module}.qweight", ("I32",), (words[0], columns))
        check(self.source, f"{module}.qzeros", ("I32",), (groups, words[1]))
        check(self.source, f"{module}.scales", tuple(SCALES), (groups, columns))
        zeros = self.source.read(f"{module}.qzeros")
        zeros = read_zeros(zeros, bits, columns, self.zeros)
        scales = self.source.read(f"{module}.scales")
        index = self._index(module, rows, groups)
        codes = unpack_stream(self.source.read(f"{module}.qweight"), bits, 0, rows)
        order = np.arange(rows) // group
        if index is None or (index == order).all():
            return assemble(codes, scales, zeros, bits, group)
        stable = np.argsort(index, kind="stable")
        if (index[stable] == order).all():
            w = assemble(codes[stable], scales, zeros, bits, group)
            return dataclasses.replace(w, index=stable.astype(np.int32))
        wide = scales.astype(np.float32)[index]
        values = (codes.astype(np.float32) - zeros[index]) * wide
        return Dense(
            values.astype(scales.dtype).T,
            f"its g_idx makes groups of other sizes than {group}",
        )

    def unused(self) -> Mapping[str, str]:
        """Nothing is left unread."""
        return {}

    def _index(self, module: str, rows: int, groups: int) -> np.ndarray | None:
        name = f"{module}.g_idx"
        if name not in self.source:
            return None
        index = need(self.source, name, ("I32", "I64"), (rows,))
        if index.min() < 0 or index.max() >= groups:
            raise CheckpointError(
                f"{self.source.where(name)} names the groups {index.min()} to "
                f"{index.max()}; the layer has groups 0 to {groups - 1}"
            )
        return index


def assemble(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, group: int
) -> Unpacked:
    """Return unsigned codes ``[in, out]`` as a matrix.

    Where every zero point is ``2^(bits − 1)`` the codes are signed integers less their
    smallest, and need no zero points.
    """
    block, shape = (group, 1), (codes.shape[0], codes.shape[1])
    scale = {np.dtype(v).name: v for v in ("float16", "float32")}.get(
        scales.dtype.name, "bfloat16"
    )
    middle = 2 ** (bits - 1)
    symmetric = bool((zeros == middle).all())
    if symmetric and bits == 8:
        codes = codes ^ 0x80  # int8 is stored as two's complement
    kind = f"int{bits}" if symmetric else f"uint{bits}"
    spec = QuantSpec(
        kind,
        block_name(block, shape),
        symmetric=symmetric,
        grid="gptq" if symmetric else "restricted",
        scale=scale,
    )
    dtype = None if scales.dtype == np.float32 else scales.dtype
    return Unpacked(codes, scales, spec, block, dtype, None if symmetric else zeros)


def read_zeros(words: np.ndarray, bits: int, count: int, version: str) -> np.ndarray:
    """Return the zero points of ``words[groups, ·]``: uint8 ``[groups, count]``."""
    if version == "v1" and bits in ONES:
        words = (words.view(np.uint32) + np.uint32(ONES[bits])).view(np.int32)
    zeros = unpack_stream(words, bits, 1, count)
    if version == "v1" and bits not in ONES:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return zeros


def read(config: Mapping[str, Any], source: Source) -> GPTQReader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``gptq``.

    Raises:
        CheckpointError: the config is damaged.
        UnsupportedError: the layout is one that is not known.
    """
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(stored, str) or stored not in FORMATS:
        raise UnsupportedError(
            f"quantization_config: checkpoint_format is {shorten(stored)}; "
            f"{' and '.join(FORMATS)} are read, layouts for one kernel are not"
        )
    return GPTQReader(source, layers(config), FORMATS[stored])


def layers(config: Mapping[str, Any]) -> Callable[[str], Layer | None]:
    """Return what a config says of each module, its ``dynamic`` overrides included."""
    usual = _layer(config)
    rules = [
        (_matcher(text), text.startswith("-:"), override)
        for text, override in settings.section(config, "dynamic").items()
    ]
    rules.sort(key=lambda rule: not rule[1])

    def layer(module: str) -> Layer | None:
        for matches, negative, override in rules:
            if matches(module):
                return None if negative else override_layer(usual, override)
        return usual

    return layer


def override_layer(usual: Layer, override: Any) -> Layer:
    """Return a layer's settings, with what an override says in their place."""
    if not isinstance(override, dict):
        raise CheckpointError(
            f"quantization_config: an override is {shorten(override)}; it must be an "
            "object of settings"
        )
    config = {"bits": usual.bits, "group_size": usual.group}
    return _layer(config | {k: v for k, v in override.items() if v is not None})


def _layer(config: Mapping[str, Any]) -> Layer:
    bits = settings.integer(config, "bits", BITS)
    group = settings.integer(config, "group_size", range(-1, 2**31), 128)
    if group == 0:
        raise CheckpointError(
            "quantization_config: 'group_size' is 0; it must be a positive number, or "
            "-1 for one group"
        )
    return Layer(bits, group)


def _matcher(text: str) -> Callable[[str], object]:
    """Return whether a rule of ``dynamic`` matches: a name, or a pattern."""
    bare = text[2:] if text[:2] in ("-:", "+:") else text
    if re.fullmatch(r"[\w.]*", bare):
        return lambda module: module == bare
    return settings.pattern(bare, "dynamic").match
