"""What a comparison found, as plain numbers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxq.comparison import table
from jaxq.comparison.spread import (
    Losses,
    Measured,
    Verdict,
    measured,
    verdicts,
)
from jaxq.recipe import Recipe

METRICS = ("kl", "perplexity", "top1", "seconds", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Run:
    """One quantization, evaluated.

    Attributes:
        seed: of the draw of calibration data; None where none was needed.
        bits_per_weight: stored, over all parameters.
        nbytes: stored.
        perplexity: on the text.
        kl: ``KL(float ‖ this)`` per token, nats.
        top1: share of tokens where both find the same likeliest.
        seconds: to quantize, compiling included.
        tokens_per_second: of the evaluation's forward pass; NaN when not measured.
        fallbacks: weights that calibration could not help, by path, and why.
    """

    seed: int | None
    bits_per_weight: float
    nbytes: int
    perplexity: float
    kl: float = 0.0
    top1: float = 1.0
    seconds: float = 0.0
    tokens_per_second: float = float("nan")
    fallbacks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        out = dataclasses.asdict(self)
        out["bytes"] = out.pop("nbytes")
        return out


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe and its runs, one per seed, or one alone if it needs no data."""

    recipe: Recipe
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    @property
    def drawn(self) -> bool:
        """Whether the runs depend on a draw of calibration data."""
        return self.runs[0].seed is not None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, the mean over runs (they rarely differ)."""
        return self["bits_per_weight"].mean

    @property
    def nbytes(self) -> int:
        """Stored bytes, of the largest run."""
        return max(run.nbytes for run in self.runs)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Weights that calibration could not help in any run, and why."""
        return {path: why for run in self.runs for path, why in run.fallbacks.items()}

    def __getitem__(self, metric: str) -> Measured:
        """Return a metric, a field of `Run`, with its spread over seeds."""
        return measured([getattr(run, metric) for run in self.runs], self.drawn)


@dataclasses.dataclass(frozen=True)
class Text:
    """The text that the models were evaluated on.

    Attributes:
        sha256: of its UTF-8 bytes.
        tokens: the whole text has.
        windows: that were cut from it.
        window: tokens of each; all but the first are predicted.
    """

    sha256: str
    tokens: int
    windows: int
    window: int


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The data that recipes were calibrated on: per seed, windows of one text.

    Attributes:
        sha256: of the text's UTF-8 bytes.
        tokens: the whole text has.
        sequences: windows of one draw.
        length: tokens of each.
        seeds: of the draws.
    """

    sha256: str
    tokens: int
    sequences: int
    length: int
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What each of several recipes made of one model; prints as a table.

    Attributes:
        model: its name.
        parameters: how many weights it has.
        whole: the float model itself.
        rows: one per recipe, in the order given.
        text: what the models were evaluated on.
        calibration: what recipes were calibrated on; None if none needed data.
        machine: versions of Python and of the libraries, and the device.
    """

    model: str
    parameters: int
    whole: Run
    rows: tuple[Row, ...]
    text: Text
    calibration: Calibration | None
    machine: Mapping[str, str]

    @functools.cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """How each recipe stands among those that are not larger, by KL."""
        found = [
            Losses(r.name, r.bits_per_weight, tuple(x.kl for x in r.runs), r.drawn)
            for r in self.rows
        ]
        return tuple(verdicts(found))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, everything included, for JSON."""
        return {
            "format": "jaxq comparison",
            "format_version": 1,
            "model": self.model,
            "parameters": self.parameters,
            "text": dataclasses.asdict(self.text),
            "calibration": self.calibration and _plain(self.calibration),
            "machine": dict(self.machine),
            "float": self.whole.to_dict(),
            "recipes": [
                _row_dict(row, verdict)
                for row, verdict in zip(self.rows, self.verdicts, strict=True)
            ],
        }

    def __str__(self) -> str:
        """Return a plain table with its legend."""
        return table.plain(self)


def _plain(calibration: Calibration) -> dict[str, Any]:
    return dataclasses.asdict(calibration) | {"seeds": list(calibration.seeds)}


def _row_dict(row: Row, verdict: Verdict) -> dict[str, Any]:
    return {
        "recipe": row.name,
        "bits_per_weight": row.bits_per_weight,
        "bytes": row.nbytes,
        **{name: row[name].to_dict() for name in METRICS},
        "best": verdict.best,
        "against": verdict.against,
        "ratio": verdict.ratio,
        "noise": verdict.noise,
        "runs": [run.to_dict() for run in row.runs],
        "definition": row.recipe.to_dict(),
    }
