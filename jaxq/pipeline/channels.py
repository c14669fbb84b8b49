"""A convolution by its input channels: what the positions of its window share.

A scale of the activation is one per channel, whatever the window reads of it. So where
a transform looks at the ``K = window x channels`` elements of a patch, it is shown the
channels, with the positions of the window as more outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.pipeline.solve import Task
from jaxq.solvers.base import Statistics


def by_channel(statistics: Statistics, task: Task) -> Statistics:
    """Return the statistics of a patch's channels: the mean and the largest of each.

    Those of a matrix product, and what is no statistic of single elements, stay as they
    are.
    """
    if not task.window:
        return statistics
    rank, lengths = len(task.contracting), _lengths(task)
    places = [i - rank for i, a in enumerate(task.contracting) if a in task.window]

    def each(values: jax.Array | None, reduce: Callable[..., Any]) -> jax.Array | None:
        if values is None:
            return None
        lead = values.shape[:-1]
        return reduce(values.reshape(*lead, *lengths), places).reshape(*lead, -1)

    return statistics._replace(
        magnitude=each(statistics.magnitude, jnp.mean),
        absmax=each(statistics.absmax, jnp.max),
    )


def channel_matrix(task: Task) -> jax.Array:
    """Return the weight as ``float32[*stack, channels, window x N]``."""
    w = task.matrix()
    if not task.window:
        return w
    lengths, stack = _lengths(task), task.stack
    pairs = list(enumerate(task.contracting, len(stack)))
    order = [i for i, a in pairs if a not in task.window]
    channels = math.prod(lengths[i - len(stack)] for i in order)
    order += [i for i, a in pairs if a in task.window]
    w = w.reshape(*stack, *lengths, w.shape[-1])
    w = w.transpose((*range(len(stack)), *order, w.ndim - 1))
    return w.reshape(*stack, channels, -1)


def over_window(scales: jax.Array, task: Task) -> jax.Array:
    """Return ``[..., channels]`` at every element of a patch, ``[..., K]``."""
    if not task.window:
        return scales
    lengths = _lengths(task)
    pairs = zip(task.contracting, lengths, strict=True)
    ones = [1 if a in task.window else n for a, n in pairs]
    lead = scales.shape[:-1]
    wide = jnp.broadcast_to(scales.reshape(*lead, *ones), (*lead, *lengths))
    return wide.reshape(*lead, math.prod(lengths))


def _lengths(task: Task) -> list[int]:
    """Return the lengths of the contracted axes."""
    return [task.weight.shape[a] for a in task.contracting]
