"""Means with their spread over seeds, and which differences it explains."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Recipes whose sizes differ by less count as of one size: a column order or another
# layout of the scales costs a few bytes, by which nobody chooses between recipes.
SAME_SIZE = 1.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """A mean over calibration draws and how far the draws lie apart.

    Attributes:
        mean: over the draws.
        spread: their sample standard deviation; 0 for a recipe that needs no data (a
            second run gives the same numbers), None when one draw cannot tell.
    """

    mean: float
    spread: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data."""
        return dataclasses.asdict(self)


def measured(values: Sequence[float], drawn: bool) -> Measured:
    """Return the mean of a metric and its spread, ``sqrt(Σ(v − mean)² / (n − 1))``.

    Args:
        values: one per run.
        drawn: whether the runs depend on a draw of calibration data.

    Example:
        >>> measured([1.0, 2.0, 3.0], drawn=True)
        Measured(mean=2.0, spread=1.0)
        >>> measured([1.0], drawn=True), measured([1.0], drawn=False)
        (Measured(mean=1.0, spread=None), Measured(mean=1.0, spread=0.0))
    """
    if not all(map(math.isfinite, values)):
        return Measured(math.inf, None)
    return Measured(float(np.mean(values)), deviation(values, drawn))


def deviation(values: Sequence[float] | np.ndarray, drawn: bool) -> float | None:
    """Return the sample standard deviation; 0 or None where `Measured` says so."""
    if not drawn:
        return 0.0
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a recipe stands among those that are not larger.

    Attributes:
        against: the recipe with the smallest mean KL of all that are not larger
            (within 5 %).
        ratio: this recipe's mean KL over that one's.
        noise: whether the mean difference of the two is within its own spread over
            seeds: other calibration data might reverse it. None when there was one
            draw only, which cannot tell.
    """

    against: str
    ratio: float
    noise: bool | None

    @property
    def best(self) -> bool:
        """Whether nothing of the same size or smaller has a smaller KL."""
        return self.ratio <= 1


@dataclasses.dataclass(frozen=True)
class Losses:
    """A recipe's KL, one number per draw.

    Attributes:
        recipe: its name.
        bits: stored, per weight.
        values: in the order of the seeds; a single one where no data is needed.
        drawn: whether they depend on a draw.
    """

    recipe: str
    bits: float
    values: tuple[float, ...]
    drawn: bool

    @property
    def mean(self) -> float:
        """The mean over the draws."""
        return measured(self.values, self.drawn).mean


def verdicts(found: Sequence[Losses]) -> list[Verdict]:
    """Hold every recipe against the best of those that are not larger.

    The recipes see the same draws, so draws are compared in pairs: a draw that is bad
    for both tells nothing about their difference.

    Example:
        >>> near = Losses("near", 4.5, (0.10, 0.12), drawn=True)
        >>> far = Losses("far", 4.5, (0.20, 0.24), drawn=True)
        >>> [(v.against, v.ratio, v.noise) for v in verdicts([near, far])]
        [('near', 1.0, False), ('near', 2.0, False)]
    """

    def judge(one: Losses) -> Verdict:
        rivals = [other for other in found if other.bits <= SAME_SIZE * one.bits]
        best = min(rivals, key=lambda other: other.mean)
        if best.mean == one.mean:
            return Verdict(one.recipe, 1.0, False)
        ratio = one.mean / best.mean if best.mean > 0 else math.inf
        return Verdict(best.recipe, ratio, _is_noise(one, best))

    return [judge(one) for one in found]


def _is_noise(one: Losses, other: Losses) -> bool | None:
    """Whether the mean paired difference is within its spread."""
    difference = np.subtract(one.values, other.values)
    if not np.isfinite(difference).all():
        return False
    spread = deviation(difference, one.drawn or other.drawn)
    return None if spread is None else bool(abs(difference.mean()) < spread)
