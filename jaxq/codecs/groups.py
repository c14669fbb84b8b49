"""Which settings of a compressed-tensors config a layer has, and what they mean."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import settings
from jaxq.codecs.floats import small_scales
from jaxq.codecs.words import unpack_fields, unpack_stream
from jaxq.spec import Block, QuantSpec

STRATEGIES = (
    *("tensor", "channel", "group", "block", "token", "tensor_group"),
    *("attn_head", "group_token"),
)
E4M3 = "torch.float8_e4m3fn"
MX_SCALE = "torch.uint8"  # the exponent of a power of two
NVFP4 = ("tensor_group", 4, E4M3)
# how scales of activations are rounded: torch's name -> jaxq's
FLOAT_SCALES = {
    E4M3: "e4m3",
    "torch.float32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
}
DENSE_SINCE = (0, 18)  # before, a word held whole fields


@dataclasses.dataclass(frozen=True)
class Args:
    """How one operand is quantized.

    Attributes:
        bits: per code.
        kind: ``int`` or ``float``.
        strategy: what shares a scale, of `STRATEGIES`.
        group: channels per scale, for groups.
        tile: ``(out, in)`` of a block, for blocks.
        symmetric: whether there are no zero points.
        dynamic: whether scales are computed when it runs; ``"local"`` of blocks only.
        scale: the dtype that scales are rounded to, as torch calls it, or None.
    """

    bits: int
    kind: str
    strategy: str
    group: int
    tile: tuple[int, int]
    symmetric: bool
    dynamic: bool | str
    scale: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Args":
        """Read the settings of one operand; what is missing has its default.

        Raises:
            CheckpointError: a value is none that is known.
        """
        group = settings.integer(data, "group_size", range(-1, 2**31), -1)
        tile = data.get("block_structure")
        strategy = data.get("strategy")
        if strategy is None:
            strategy = "group" if group > 0 else "channel" if group == -1 else "tensor"
            strategy = "block" if tile else strategy
        strategy = settings.choice({"strategy": strategy}, "strategy", STRATEGIES)
        if strategy in ("group", "tensor_group") and group < 1:
            raise CheckpointError(
                f"quantization_config: strategy {strategy!r} needs a group_size, and "
                f"it is {shorten(data.get('group_size'))}"
            )
        dynamic = data.get("dynamic", False)
        if dynamic != "local":
            dynamic = settings.flag(data, "dynamic", False)
        return cls(
            bits=settings.integer(data, "num_bits", range(1, 9), 8),
            kind=settings.choice(data, "type", ("int", "float"), "int"),
            strategy=strategy,
            group=group,
            tile=_tile(tile) if strategy == "block" else (1, 1),
            symmetric=settings.flag(data, "symmetric", True),
            dynamic=dynamic,
            scale=_scale_dtype(data),
        )

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the block ``(in, out)`` of a weight ``[out, in]``."""
        columns, rows = shape
        if self.strategy in ("group", "tensor_group"):
            return min(self.group, rows), 1
        if self.strategy == "block":
            return min(self.tile[1], rows), min(self.tile[0], columns)
        if self.strategy == "tensor":
            return rows, columns
        return rows, 1

    def activation(self) -> QuantSpec | None:
        """Return how a product is to quantize its input; None where none can.

        Integers of 2 to 8 bits, fp8 and fp4: per tensor, token or group; and the
        two-level fp4 of nvfp4 (``dynamic: local``), whose blocks find their scales when
        it runs, and whose global scale, a divisor, was found before.
        """
        grouped = self.strategy in ("group", "tensor_group")
        blocks = {"tensor": "tensor", "token": "token"}
        block = self.group if grouped else blocks.get(self.strategy)
        if block is None or (grouped and not self.dynamic):
            return None
        if self.kind == "float":
            return self._float_activation(block)
        if self.bits == 1 or self.scale is not None or self.dynamic == "local":
            return None
        if self.symmetric:
            grid = "gptq" if self.dynamic else "full"
            return QuantSpec(f"int{self.bits}", block, grid=grid)
        return QuantSpec(f"int{self.bits}", block, symmetric=False)

    def _float_activation(self, block: Block) -> QuantSpec | None:
        name = {4: "fp4_e2m1", 8: "fp8_e4m3"}.get(self.bits)
        if name is None or not self.symmetric:
            return None
        if self.dynamic == "local":
            nvfp4 = (self.strategy, self.bits, self.scale) == NVFP4
            return QuantSpec(name, block, scale=small_scales(True)) if nvfp4 else None
        if self.scale == MX_SCALE:
            mx = block == 32
            spec = QuantSpec(name, block, scale="e8m0", exponent="near")
            return spec if mx else None
        scale = "float32" if self.scale is None else FLOAT_SCALES.get(self.scale)
        return None if scale is None else QuantSpec(name, block, scale=scale)


@dataclasses.dataclass(frozen=True)
class Group:
    """The settings of some layers."""

    weights: Args | None
    inputs: Args | None


@dataclasses.dataclass(frozen=True)
class Groups:
    """All settings of a config.

    Attributes:
        exact: by the name of a layer.
        patterns: by what matches its name, from its beginning.
        usual: of every linear layer that nothing else names.
        ignored: whether a layer is left alone.
        unpack: how the writer packed widths that do not divide 32.
    """

    exact: Mapping[str, Group]
    patterns: tuple[tuple[Callable[[str], object], Group], ...]
    usual: Group | None
    ignored: Callable[[str], bool]
    unpack: Callable[..., np.ndarray]

    @classmethod
    def of(cls, config: Mapping[str, Any], formats: tuple[str, ...]) -> "Groups":
        """Read the groups of a config.

        Raises:
            CheckpointError: a value is none that is known.
            UnsupportedError: a group's format is none of ``formats``.
        """
        exact: dict[str, Group] = {}
        patterns: list[tuple[Callable[[str], object], Group]] = []
        usual = None
        for data in settings.section(config, "config_groups").values():
            if not isinstance(data, dict):
                raise CheckpointError(
                    f"quantization_config: a group is {shorten(data)}, not an object"
                )
            group = _group(data, config.get("format"), formats)
            for target in settings.names(data, "targets"):
                if target.startswith("re:"):
                    compiled = settings.pattern(target[3:], "targets")
                    patterns.append((compiled.match, group))
                elif target[:1].isupper():
                    usual = group if usual is None else usual
                else:
                    exact[target] = group
        return cls(exact, tuple(patterns), usual, _ignored(config), _packing(config))

    def find(self, module: str) -> Group | None:
        """Return the settings of a layer: by name, by pattern, by class."""
        if self.ignored(module):
            return None
        if module in self.exact:
            return self.exact[module]
        found = (group for matches, group in self.patterns if matches(module))
        return next(found, self.usual)


def _group(data: Mapping[str, Any], usual: Any, formats: tuple[str, ...]) -> Group:
    given = data.get("format") or usual
    weights = settings.section(data, "weights")
    if weights and given is not None and given not in formats:
        raise UnsupportedError(
            f"quantization_config: the format is {shorten(given)}; known are "
            f"{', '.join(formats)}"
        )
    inputs = settings.section(data, "input_activations")
    return Group(
        Args.of(weights) if weights else None, Args.of(inputs) if inputs else None
    )


def _ignored(config: Mapping[str, Any]) -> Callable[[str], bool]:
    names = settings.names(config, "ignore")
    exact = {name for name in names if not name.startswith("re:")}
    patterns = [settings.pattern(n[3:], "ignore") for n in names if n[:3] == "re:"]
    return lambda module: (
        module in exact or any(p.match(module) is not None for p in patterns)
    )


def _scale_dtype(data: Mapping[str, Any]) -> str | None:
    given = data.get("scale_dtype")
    if given is not None and not isinstance(given, str):
        raise CheckpointError(
            f"quantization_config: scale_dtype is {shorten(given)}; it must be a "
            "dtype's name, as 'torch.uint8', or null"
        )
    usual = E4M3 if data.get("strategy") == "tensor_group" else None
    return usual if given is None else f"torch.{given.removeprefix('torch.')}"


def _packing(config: Mapping[str, Any]) -> Callable[..., np.ndarray]:
    numbers = str(config.get("version") or "0.18").split(".")[:2]
    release = tuple(int(n) if n.isdecimal() else 0 for n in numbers)
    return unpack_stream if release >= DENSE_SINCE else unpack_fields


def _tile(tile: Any) -> tuple[int, int]:
    if isinstance(tile, str) and tile.count("x") == 1:  # legacy: "128x128"
        tile = [int(n) if n.isdecimal() else None for n in tile.split("x")]
    sizes = isinstance(tile, list) and len(tile) == 2
    if not sizes or not all(type(n) is int and 0 < n < 2**31 for n in tile):
        raise CheckpointError(
            f"quantization_config: block_structure is {shorten(tile)}; it must be two "
            "positive sizes, [out, in]"
        )
    return tile[0], tile[1]
