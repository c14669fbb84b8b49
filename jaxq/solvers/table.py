"""The table of solvers, one row each, and the compiled call of any of them."""

import functools
from typing import Any

import jax

from jaxq.qtensor import QTensor
from jaxq.solvers.autoround import TUNING
from jaxq.solvers.base import Solved, Solver, Statistics
from jaxq.solvers.bcq import bcq
from jaxq.solvers.bcq import optional_statistics as signs_statistics
from jaxq.solvers.gptq import gptq
from jaxq.solvers.rtn import optional_statistics, solve_rtn
from jaxq.spec import QuantSpec


def start_autoround(*args: Any, **options: Any) -> Solved:
    """Return what block tuning starts from: GPTQ, with the weights it compensated.

    Options of the tuning (`jaxq.solvers.autoround.Settings`) are the pipeline's.
    """
    ours = {name: value for name, value in options.items() if name not in TUNING}
    return gptq(*args, **ours, compensated=True)


_ROWS: tuple[Solver, ...] = (
    Solver("rtn", solve_rtn, optional=optional_statistics),
    Solver("bcq", bcq, optional=signs_statistics),
    Solver(
        "gptq",
        gptq,
        needs=("gram", "tokens"),
        optional=lambda options: ("drift",) if options.get("drift") else (),
        order="activation",
    ),
    Solver(
        "autoround",
        start_autoround,
        needs=("gram", "tokens"),
        optional=lambda options: ("drift",) if options.get("drift") else (),
        order="activation",
        tunes=True,
    ),
)

SOLVERS: dict[str, Solver] = {row.name: row for row in _ROWS}

_STATIC = ("spec", "solver", "options", "contracting", "stacked")


@functools.partial(jax.jit, static_argnames=_STATIC)
def solve_with(
    weight: jax.Array,
    statistics: Statistics | None,
    *,
    spec: QuantSpec,
    solver: str,
    options: tuple[tuple[str, Any], ...],
    contracting: tuple[int, ...],
    stacked: tuple[int, ...],
) -> Solved:
    """Run a solver of the table, traced and compiled once per shape.

    Under `jax.eval_shape` it says what the result will weigh, and refuses what the
    solver would refuse, without a weight being read; the trace is used again.

    Args:
        weight: float, any shape.
        statistics: what the solver's row needs; None for a data-free solver.
        spec: format, blocks and scales.
        solver: a key of `SOLVERS`.
        options: the solver's keyword arguments, as pairs.
        contracting: the contracted axes.
        stacked: axes that enumerate independent weights.
    """
    run = SOLVERS[solver].run
    return run(
        weight, statistics, spec, axis=contracting, stacked=stacked, **dict(options)
    )


def solve(weight: jax.Array, **how: Any) -> QTensor:
    """Return the weight as a data-free solver makes it; see `solve_with`."""
    return solve_with(weight, None, **how).weight
