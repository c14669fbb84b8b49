"""Weights that meet one activation, put together or cut so that few shapes are solved.

Columns do not know of each other: several weights of one shape can go through a solver
as one, and a wide one square by square.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift.program import Key
from jaxq.pipeline.solve import Task, solve_task
from jaxq.qtensor import QTensor
from jaxq.solvers.base import Solved, Statistics
from jaxq.views import map_fields

# What is solved as one must not take much more memory than the largest weight alone.
MOST_ELEMENTS = 2**22
# Wide weights are cut into squares of at least so many rows: in smaller ones, what all
# columns share would take longer than the columns.
LEAST_ROWS = 256


def solve_all(
    tasks: Mapping[Key, Task], statistics: Mapping[Key, Statistics]
) -> dict[Key, Solved]:
    """Solve weights that meet one activation.

    Put together, they need one factorization of the Gram matrix, and one compiled
    function does for what would be several.

    Args:
        tasks: the weights, changed by their transforms.
        statistics: in the coordinates of each; the same where nothing is transformed.
    """
    out: dict[Key, Solved] = {}
    for keys in _rows(tasks):
        many, seen = [tasks[key] for key in keys], statistics[keys[0]]
        if len(many) == 1:
            out[keys[0]] = _solve_squares(many[0], seen)
            continue
        joined = jnp.concatenate([task.weight for task in many], axis=1)
        solved = solve_task(dataclasses.replace(many[0], weight=joined), seen)
        out |= zip(keys, _parts(solved, len(keys)), strict=True)
    return out


def _solve_squares(task: Task, statistics: Statistics) -> Solved:
    """Solve a weight; one that is made of squares, square after square.

    What is compiled for one square serves all, those of other weights too; to order and
    factor the Gram matrix anew for each is a thirtieth of its rounding.
    """
    if not _is_squares(task) or task.weight.shape[0] == task.weight.shape[1]:
        return solve_task(task, statistics)
    size, columns = task.weight.shape
    cut = (
        jax.lax.dynamic_slice_in_dim(task.weight, start, size, axis=1)
        for start in range(0, columns, size)
    )
    squares = [solve_task(dataclasses.replace(task, weight=w), statistics) for w in cut]
    weight, target = jax.tree.map(
        lambda *a: jnp.concatenate(a, axis=1),
        *((one.weight, one.compensated) for one in squares),
    )
    return Solved(weight, squares[0].info, target)


def _is_squares(task: Task) -> bool:
    """Whether the weight is one or more squares side by side."""
    if not _is_plain(task):
        return False
    rows, columns = task.weight.shape
    return rows >= LEAST_ROWS and columns % rows == 0


def _rows(tasks: Mapping[Key, Task]) -> Iterator[Sequence[Key]]:
    """Yield the weights that are solved as one; the others each for itself."""
    alike: dict[Any, list[Key]] = {}
    for key, task in tasks.items():
        w = task.weight
        joins = _is_plain(task) and not _is_squares(task)
        same: Any = (task.rule, w.shape, w.dtype) if joins else key
        alike.setdefault(same, []).append(key)
    for keys in alike.values():
        count = max(MOST_ELEMENTS // max(tasks[keys[0]].weight.size, 1), 1)
        for start in range(0, len(keys), count):
            yield keys[start : start + count]


def _is_plain(task: Task) -> bool:
    """Whether the weight is a matrix on one device whose columns have own scales."""
    spec = task.spec
    return (
        task.contracting == (0,)
        and task.weight.ndim == 2
        and len(task.weight.devices()) == 1
        and not task.rule.transforms
        and isinstance(spec.block, int)
        and isinstance(spec.scale, str)
        and not spec.binary
    )


def _parts(solved: Solved, count: int) -> Iterator[Solved]:
    """Yield what was found for each of ``count`` weights of one width."""
    for i in range(count):

        def part(a: jax.Array, i: int = i) -> jax.Array:
            size = a.shape[1] // count
            return a[:, i * size : (i + 1) * size]

        q: QTensor = map_fields(solved.weight, part)
        target = solved.compensated
        yield Solved(q, solved.info, None if target is None else part(target))
