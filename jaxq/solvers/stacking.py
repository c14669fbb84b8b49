"""Independent weights stacked in one array: solve each for itself, one at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.qtensor import QTensor
from jaxq.quantize import Axes, Blocking, quantize
from jaxq.solvers.base import Solved, Statistics
from jaxq.spec import QuantSpec

# (weight, its statistics, its contracted axes) -> what a solver returns
SolveOne = Callable[[jax.Array, Statistics, tuple[int, ...]], Solved]


def solve_each(
    solve: SolveOne,
    weight: jax.Array,
    statistics: Statistics,
    spec: QuantSpec,
    *,
    axis: Axes = None,
    stacked: Sequence[int] = (),
) -> Solved:
    """Return ``solve`` of every weight along the ``stacked`` axes.

    One after the other (`jax.lax.map`), so that the memory of the work does not grow
    with the number of weights, and compiled once.

    Args:
        solve: for one weight without stacked axes.
        weight: float, any shape.
        statistics: with the stacked axes leading, ascending.
        spec: how it is quantized.
        axis: the contracted axes.
        stacked: axes that enumerate independent weights.
    """
    where = Blocking.of(spec, weight.shape, axis, stacked)
    if not where.stacked:
        return solve(weight, statistics, where.contracting)
    lengths = tuple(weight.shape[a] for a in where.stacked)
    kept = [a for a in range(weight.ndim) if a not in where.stacked]
    contracting = tuple(kept.index(a) for a in where.contracting)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(math.prod(lengths), *x.shape[len(lengths) :])

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(*lengths, *x.shape[1:])

    def restore(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(join(x), range(len(lengths)), where.stacked)

    first = jnp.moveaxis(weight, where.stacked, range(len(lengths)))
    solved = lax.map(
        lambda pair: solve(pair[0], pair[1], contracting),
        (split(first), jax.tree.map(split, statistics)),
    )
    leaves = map(restore, jax.tree.leaves(solved.weight))
    whole = jax.eval_shape(lambda w: quantize(w, spec, axis, stacked=stacked), weight)
    q: Any = jax.tree.unflatten(jax.tree.structure(whole), leaves)
    assert isinstance(q, QTensor)
    compensated = solved.compensated
    return Solved(
        q,
        jax.tree.map(join, solved.info),
        None if compensated is None else restore(compensated),
    )
