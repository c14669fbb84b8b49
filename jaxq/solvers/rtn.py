"""RTN: round to nearest, in a range chosen without data."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxq.qtensor import QTensor
from jaxq.quantize import Axes, Blocking, quantize
from jaxq.solvers.base import Solved
from jaxq.solvers.clipping import clipped_bounds
from jaxq.spec import QuantSpec


def rtn(
    weight: jax.Array,
    statistics: Any,
    spec: QuantSpec,
    *,
    axis: Axes = None,
    stacked: Sequence[int] = (),
    clip: str = "absmax",
    **options: Any,
) -> QTensor:
    """Round every weight to its nearest code: ``q = clip(⌊w / s⌉ + z)``.

    Args:
        weight: float, any shape.
        statistics: unused (a data-free solver).
        spec: format, blocks and scales.
        axis: the contracted axes.
        stacked: axes that enumerate independent weights.
        clip: how the range of a block is chosen: ``absmax`` (nothing clipped),
            ``percentile`` (option ``percent``) or ``mse`` (options ``steps``,
            ``smallest``, ``exponent``).
        **options: of the clipping method.

    Raises:
        UnknownNameError: on an unknown clipping method, or an option it does not have.
        ValueError: when a centered spec is to be clipped.
    """
    if spec.center:
        if clip != "absmax" or options:
            raise ValueError(
                f"clip={clip!r} chooses a range of the weight, but center=True rounds "
                f"the weight less its mean: use clip='absmax', or center=False"
            )
        return quantize(weight, spec, axis, stacked=stacked)
    where = Blocking.of(spec, weight.shape, axis, stacked)
    bounds = clipped_bounds(weight, spec, where, clip, options)
    return quantize(weight, spec, axis, stacked=stacked, bounds=bounds)


def solve_rtn(*args: Any, **options: Any) -> Solved:
    """Return `rtn` as a row of the table of solvers: without evidence."""
    return Solved(rtn(*args, **options), {})
