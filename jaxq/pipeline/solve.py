"""Solve one weight: statistics in its coordinates, the solver, and the evidence."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.explicit_axes import replicated
from jaxq.lift.program import Key
from jaxq.pipeline.feature_groups import FeatureGroups
from jaxq.plan import PlanRow
from jaxq.qtensor import QTensor
from jaxq.quantize import quantize
from jaxq.recipe import Rule
from jaxq.sharding import solved_on_mesh
from jaxq.solvers import solve_with
from jaxq.solvers.base import Solved, Statistics
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Task:
    """One weight that is to be solved.

    Attributes:
        key: its name.
        rule: what the recipe says.
        contracting: its contracted axes.
        stacked: its axes that enumerate independent weights.
        weight: its float values.
        window: of a convolution, the contracted axes that are positions in its window.
        groups: of a convolution, how many groups of features its outputs fall into,
            each a weight of its own that meets its own channels.
    """

    key: Key
    rule: Rule
    contracting: tuple[int, ...]
    stacked: tuple[int, ...]
    weight: Any
    window: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, key: Key, row: PlanRow, weight: Any) -> "Task":
        """Return the task of a plan's row; scanned axes are gone from its slices."""
        if row.rule is None:
            raise ValueError(f"{key} stays float: there is nothing to solve")
        gone = len(key.index)
        return cls(
            key,
            row.rule,
            tuple(a - gone for a in row.contracting),
            tuple(a - gone for a in row.stacked if a >= gone),
            weight,
            tuple(a - gone for a in row.window),
            row.groups,
        )

    @property
    def spec(self) -> QuantSpec:
        """How it is quantized."""
        if self.rule.weight is None:
            raise ValueError(f"{self.key} stays float: there is nothing to solve")
        return self.rule.weight

    @property
    def stack(self) -> tuple[int, ...]:
        """The lengths of the stacked axes, and the number of feature groups if any."""
        groups = (self.groups,) if self.groups > 1 else ()
        return tuple(self.weight.shape[a] for a in self.stacked) + groups

    @property
    def width(self) -> int:
        """The number of contracted elements."""
        return math.prod(self.weight.shape[a] for a in self.contracting)

    @property
    def group(self) -> int | None:
        """The group size along the contraction, if it has one."""
        return self.spec.block if isinstance(self.spec.block, int) else None

    def fitted(self, statistics: Statistics) -> Statistics:
        """Return statistics with the weight's own stack; a shared one is repeated."""
        flat, want = statistics.tokens.shape, self.stack
        if flat == want:
            return statistics
        if math.prod(flat) == math.prod(want):
            return jax.tree.map(
                lambda a: a.reshape(*want, *a.shape[len(flat) :]), statistics
            )
        if flat:
            raise ValueError(
                f"{self.key} stacks {want} weights, but its activation {flat}: "
                f"keep it out of calibration with Rule('<path>', spec, solver='rtn')"
            )
        return jax.tree.map(
            lambda a: jnp.broadcast_to(a, (*want, *a.shape)), statistics
        )

    def matrix(self) -> jax.Array:
        """Return the weight as ``float32[*stack, K, N]``."""
        w = jnp.asarray(self.weight, jnp.float32)
        return as_matrix(w, self.contracting, self.stacked, self.groups)

    def along_rows(self, values: jax.Array) -> jax.Array:
        """Return one value per row, ``[*stack, K]``, beside the weight's axes."""
        lengths = [self.weight.shape[a] for a in self.contracting]
        x = values.reshape(*self.stack, *lengths)
        order = (*self.stacked, *self.contracting)
        x = x.transpose(sorted(range(len(order)), key=lambda i: order[i]))
        shape = [n if a in order else 1 for a, n in enumerate(self.weight.shape)]
        return x.reshape(shape)


def as_matrix(
    w: jax.Array,
    contracting: tuple[int, ...],
    stacked: tuple[int, ...],
    groups: int = 1,
) -> jax.Array:
    """Return a weight as ``[*stack, K, N]``; feature groups are the stack's last."""
    free = [a for a in range(w.ndim) if a not in (*stacked, *contracting)]
    stack = [w.shape[a] for a in stacked]
    inner = math.prod(w.shape[a] for a in contracting)
    matrix = w.transpose((*stacked, *contracting, *free)).reshape(*stack, inner, -1)
    if groups == 1:
        return matrix
    return jnp.moveaxis(matrix.reshape(*stack, inner, groups, -1), -2, -3)


def solve_task(task: Task, statistics: Statistics | None) -> Solved:
    """Run the rule's solver on the weight, placed on a mesh like the weight."""
    solver, options = task.rule.solver, task.rule.options
    if task.groups > 1 and statistics is not None:
        return _solve_groups(task, statistics)

    def solve(weight: jax.Array, statistics: Statistics | None) -> Solved:
        return solve_with(
            weight,
            statistics,
            spec=task.spec,
            solver=solver,
            options=options,
            contracting=task.contracting,
            stacked=task.stacked,
        )

    return solved_on_mesh(solve, task.weight, statistics)


def _solve_groups(task: Task, statistics: Statistics) -> Solved:
    """Run the solver on the feature groups of a convolution as on stacked weights."""
    groups = FeatureGroups.of(task.contracting, task.stacked, task.weight.shape)
    seen = jax.tree.map(
        lambda a: jnp.moveaxis(a, len(task.stacked), groups.place), statistics
    )

    def solve(weight: jax.Array, seen: Statistics) -> Solved:
        solved = solve_with(
            groups.split(weight, task.groups),
            seen,
            spec=task.spec,
            solver=task.rule.solver,
            options=task.rule.options,
            contracting=groups.contracting,
            stacked=groups.stacked,
        )
        return groups.join(solved)

    return solved_on_mesh(solve, task.weight, seen)


def rounded(task: Task) -> QTensor:
    """Return the weight rounded to nearest in its full range."""

    def solve(weight: jax.Array) -> Solved:
        return Solved(_rounded(weight, task.spec, task.contracting, task.stacked), {})

    return solved_on_mesh(solve, task.weight).weight


def searched(task: Task) -> QTensor:
    """Return the weight rounded to nearest, in the ranges of least error if it can be.

    What a search among transforms compares: the solver itself would take too long. Sums
    of signs are solved in few rounds: an even grid would say little of them.
    """
    spec, solver = task.spec, "bcq" if task.spec.binary else "rtn"
    clips = spec.number_format.is_integer and task.group and not spec.center
    options = (("clip", "mse"), ("steps", 20)) if clips else ()
    options = (("rounds", 2),) if spec.binary else options

    def solve(weight: jax.Array) -> Solved:
        return solve_with(
            weight,
            None,
            spec=spec,
            solver=solver,
            options=options,
            contracting=task.contracting,
            stacked=task.stacked,
        )

    return solved_on_mesh(solve, task.weight).weight


def losses(
    task: Task, q: QTensor, statistics: Statistics
) -> tuple[jax.Array, jax.Array]:
    """Return the mean squared error of the product, of ``q`` and of round to nearest.

    ``tr(Δ H Δᵀ) / (tokens · outputs)``, over all stacked weights.
    """

    def run(weight: jax.Array, q: QTensor, statistics: Statistics) -> Any:
        axes = (task.contracting, task.stacked, task.groups)
        return _losses(weight, q, statistics, task.spec, *axes)

    return replicated(run, task.weight, q, statistics)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(
    weight: jax.Array,
    spec: QuantSpec,
    contracting: tuple[int, ...],
    stacked: tuple[int, ...],
) -> QTensor:
    return quantize(weight, spec, contracting, stacked=stacked)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _losses(
    weight: jax.Array,
    q: QTensor,
    statistics: Statistics,
    spec: QuantSpec,
    contracting: tuple[int, ...],
    stacked: tuple[int, ...],
    groups: int,
) -> tuple[jax.Array, jax.Array]:
    near = quantize(weight, spec, contracting, stacked=stacked)
    inner = math.prod(weight.shape[a] for a in contracting)
    stack = math.prod(weight.shape[a] for a in stacked) * groups
    outputs = weight.size // max(inner * stack, 1)
    count = jnp.sum(statistics.tokens).astype(jnp.float32) * jnp.float32(outputs)

    def loss(approximation: QTensor) -> jax.Array:
        error = weight.astype(jnp.float32) - approximation.dequantize(jnp.float32)
        delta = as_matrix(error, contracting, stacked, groups)
        moved = jnp.matmul(statistics.gram, delta, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(delta * moved) / jnp.maximum(count, jnp.float32(1))

    return loss(q), loss(near)
