"""Weights of one shape that meet one activation are solved side by side, as one."""

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


def solve_all(
    tasks: Mapping[Key, Task], statistics: Mapping[Key, Statistics]
) -> dict[Key, Solved]:
    """Solve weights that meet one activation.

    Columns do not know of each other, so those of several weights can go through one
    solver: it orders and factors the Gram matrix once, and one compiled function does
    for what would be several.

    Args:
        tasks: the weights, changed by their transforms.
        statistics: in the coordinates of each; the same where nothing is transformed.
    """
    out: dict[Key, Solved] = {}
    for keys in _rows(tasks):
        many, seen = [tasks[key] for key in keys], statistics[keys[0]]
        if len(many) == 1:
            out[keys[0]] = solve_task(many[0], seen)
            continue
        joined = jnp.concatenate([task.weight for task in many], axis=1)
        solved = solve_task(dataclasses.replace(many[0], weight=joined), seen)
        out |= zip(keys, _parts(solved, len(keys)), strict=True)
    return out


def _rows(tasks: Mapping[Key, Task]) -> Iterator[Sequence[Key]]:
    """Yield the weights that are solved as one; the others each for itself."""
    alike: dict[Any, list[Key]] = {}
    for key, task in tasks.items():
        w = task.weight
        same: Any = (task.rule, w.shape, w.dtype) if _is_plain(task) else key
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
