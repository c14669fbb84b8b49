"""The table of solvers, one row each, and the compiled call of any of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxq.qtensor import QTensor
from jaxq.solvers.rtn import rtn
from jaxq.spec import QuantSpec

SOLVERS: dict[str, Callable[..., QTensor]] = {
    "rtn": rtn,
}

_STATIC = ("spec", "solver", "options", "contracting", "stacked")


@functools.partial(jax.jit, static_argnames=_STATIC)
def solve(
    weight: jax.Array,
    *,
    spec: QuantSpec,
    solver: str,
    options: tuple[tuple[str, Any], ...],
    contracting: tuple[int, ...],
    stacked: tuple[int, ...],
) -> QTensor:
    """Run a solver of the table, traced and compiled once per shape.

    Under `jax.eval_shape` it says what the result will weigh, and refuses what the
    solver would refuse, without a weight being read; the trace is used again.

    Args:
        weight: float, any shape.
        spec: format, blocks and scales.
        solver: a key of `SOLVERS`.
        options: the solver's keyword arguments, as pairs.
        contracting: the contracted axes.
        stacked: axes that enumerate independent weights.
    """
    run = SOLVERS[solver]
    return run(weight, None, spec, axis=contracting, stacked=stacked, **dict(options))
