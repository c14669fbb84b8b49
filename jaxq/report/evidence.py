"""Evidence of calibration, as a checkpoint's manifest tells it."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorEvidence:
    """What calibration did to one weight, and what that cost on its data.

    Attributes:
        path: the parameter's path.
        solver: transforms and solver.
        tokens: how many reached it.
        loss: mean squared error of its product, ``tr(Δᵀ H Δ) / tokens``; None when not
            measured, as is everything below.
        rtn_loss: the same of its own rounding to nearest.
        damping: the share of the Gram's mean diagonal that was added.
        order: in which order columns were solved.
        seconds: spent on it.
        fallback: why it is not what the recipe asked for.
        note: anything else worth knowing.
        experts: tokens of each of the stacked weights.
        block_loss: of the block's output, before and after tuning.
    """

    path: str
    solver: str = ""
    tokens: int = 0
    loss: float | None = None
    rtn_loss: float | None = None
    damping: float | None = None
    order: str | None = None
    seconds: float = 0.0
    fallback: str | None = None
    note: str | None = None
    experts: tuple[int, ...] = ()
    block_loss: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """The loss over that of rounding to nearest."""
        if self.loss is None or not self.rtn_loss:
            return None
        return self.loss / self.rtn_loss

    @property
    def is_calibrated(self) -> bool:
        """Whether data had a say in it, or should have had."""
        return self.tokens > 0 or self.loss is not None or self.fallback is not None

    @property
    def idle(self) -> int:
        """How many of the stacked weights no token reached."""
        return sum(count == 0 for count in self.experts)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The evidence of a whole model.

    Attributes:
        tensors: one per calibrated weight.
        others: the quantized weights that needed no data.
        calibration: what it was calibrated on: ``sequences``, ``tokens``, ``sha256``,
            ``mode`` and ``reason``, as far as they are known.
    """

    tensors: tuple[TensorEvidence, ...] = ()
    others: tuple[TensorEvidence, ...] = ()
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.tensors)

    @property
    def fallbacks(self) -> dict[str, list[str]]:
        """The paths of weights that fell back, by reason."""
        return self._by(lambda tensor: tensor.fallback)

    @property
    def notes(self) -> dict[str, list[str]]:
        """The paths of weights with a note, by note."""
        return self._by(lambda tensor: tensor.note)

    def _by(self, said: Callable[[TensorEvidence], str | None]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if words := said(tensor):
                found.setdefault(words, []).append(tensor.path)
        return found

    @property
    def ratio(self) -> float | None:
        """The median over weights of the loss over that of rounding to nearest."""
        ratios = [t.ratio for t in self.tensors if t.ratio is not None]
        return statistics.median(ratios) if ratios else None

    @property
    def seconds(self) -> float:
        """Spent on the calibrated weights."""
        return sum(tensor.seconds for tensor in self.tensors)

    def totals(self) -> dict[str, Any]:
        """Return the few numbers that sum it up, as plain data."""
        return {
            "tensors": len(self.tensors),
            "without_data": len(self.others),
            "fallbacks": sum(map(len, self.fallbacks.values())),
            "idle_experts": sum(tensor.idle for tensor in self.tensors),
            "median_ratio": self.ratio,
            "seconds": self.seconds,
        }


def read_evidence(
    metadata: Mapping[str, Any], seconds: Mapping[str, Any] | None = None
) -> Evidence:
    """Return the evidence in a manifest's metadata; empty where there is none.

    Whatever is not as expected is left out: metadata is the writer's own business, and
    looking at a checkpoint must not fail for it.

    Args:
        metadata: its keys ``evidence`` and ``calibration`` are read.
        seconds: by path, where they are not in the evidence.

    Example:
        >>> found = read_evidence({"evidence": {"w": {"tokens": 8, "loss": 1.0}}})
        >>> found.tensors[0].tokens, found.tensors[0].ratio
        (8, None)
    """
    entries, calibration = metadata.get("evidence"), metadata.get("calibration")
    if not isinstance(entries, Mapping):
        return Evidence()
    apart = seconds or {}
    found = [
        _tensor(path, {"seconds": apart.get(path), **entry})
        for path, entry in entries.items()
        if isinstance(entry, Mapping)
    ]
    return Evidence(
        tuple(tensor for tensor in found if tensor.is_calibrated),
        tuple(tensor for tensor in found if not tensor.is_calibrated),
        calibration if isinstance(calibration, Mapping) else {},
    )


def describe_calibration(calibration: Mapping[str, Any]) -> list[str]:
    """Return what a model was calibrated on, in a few words each; [] if unknown.

    Example:
        >>> describe_calibration({"tokens": 65536, "mode": "one shot"})
        ['65,536 tokens', 'one shot']
    """
    said = []
    counts = [
        f"{int(count):,} {name}"
        for name in ("sequences", "tokens")
        if (count := _number(calibration.get(name))) is not None
    ]
    if counts:
        said.append(", ".join(counts))
    mode, reason = _word(calibration.get("mode")), _word(calibration.get("reason"))
    if mode:
        said.append(f"{mode}: {reason}" if reason else mode)
    return said


def _tensor(path: str, entry: Mapping[str, Any]) -> TensorEvidence:
    experts, tuned = _numbers(entry.get("experts")), _numbers(entry.get("block_loss"))
    return TensorEvidence(
        path=str(path),
        solver=_word(entry.get("solver")) or "",
        tokens=int(_number(entry.get("tokens")) or 0),
        loss=_number(entry.get("loss")),
        rtn_loss=_number(entry.get("rtn_loss")),
        damping=_number(entry.get("damping")),
        order=_word(entry.get("order")),
        seconds=_number(entry.get("seconds")) or 0.0,
        fallback=_word(entry.get("fallback")),
        note=_word(entry.get("note")),
        experts=tuple(map(int, experts)),
        block_loss=(tuned[0], tuned[1]) if len(tuned) == 2 else None,
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def _numbers(values: Any) -> list[float]:
    found = [_number(v) for v in values] if isinstance(values, list | tuple) else [None]
    return [] if None in found else [v for v in found if v is not None]


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
