"""Which settings of a compressed-tensors config a layer has, and what they mean."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import settings
from jaxq.codecs.words import unpack_fields, unpack_stream
from jaxq.spec import QuantSpec

STRATEGIES = (
    *("tensor", "channel", "group", "block", "token", "tensor_group"),
    *("attn_head", "group_token"),
)
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
    """

    bits: int
    kind: str
    strategy: str
    group: int
    tile: tuple[int, int]
    symmetric: bool
    dynamic: bool | str

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

        Two-level fp4 activations (``dynamic: local``) and other widths than 8 bits are
        left float.
        """
        if self.bits != 8 or self.dynamic == "local":
            return None
        blocks = {"tensor": "tensor", "token": "token", "group": self.group}
        block = blocks.get(self.strategy)
        if block is None or (self.kind == "float" and not self.symmetric):
            return None
        if self.kind == "float":
            return QuantSpec("fp8_e4m3", block)
        if self.symmetric:
            return QuantSpec("int8", block, grid="gptq" if self.dynamic else "full")
        return QuantSpec("int8", block, symmetric=False)


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
