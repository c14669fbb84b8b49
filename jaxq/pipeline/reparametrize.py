"""Transforms of the weights that share an activation: chosen, applied, undone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from jaxq.explicit_axes import replicated
from jaxq.lift.program import Key
from jaxq.pipeline.channels import by_channel, channel_matrix, over_window
from jaxq.pipeline.solve import Task, searched
from jaxq.pipeline.statistics import Seen
from jaxq.qtensor import QTensor
from jaxq.solvers.base import Statistics
from jaxq.transforms import TRANSFORMS, Transform, expand_gram, scale_gram

# from weights that stand in for their own to the error of the block's output
Judge = Callable[[Mapping[Key, QTensor]], float]
Transforms = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


@functools.partial(
    register_dataclass, data_fields=["scale", "index", "rows"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a weight's coordinates: ``x @ w = (x / scale)[index] @ rows``.

    Attributes:
        scale: ``float32[*stack, K]``, what rows of the weight are multiplied with and
            the activation is divided by; or None.
        index: ``int32[*stack, K']``, the channel that each row of the changed weight
            meets; or None.
        rows: ``float32[*stack, K', N]``, the changed weight; or None.
    """

    scale: jax.Array | None = None
    index: jax.Array | None = None
    rows: jax.Array | None = None

    def scaled(self, scale: jax.Array) -> "Change":
        """Return the change followed by a scale."""
        whole = scale if self.scale is None else self.scale * scale
        return Change(whole, self.index, self.rows)

    def activation(self, rows: jax.Array) -> jax.Array:
        """Return the changed activation, of ``[*stack, rows, K]``."""
        if self.scale is not None:
            rows = rows / self.scale[..., None, :]
        return rows if self.index is None else _taken(rows, self.index[..., None, :])

    def task(self, task: Task) -> Task:
        """Return the changed weight."""
        w = task.weight
        if self.scale is not None:
            w = jnp.asarray(w, jnp.float32) * task.along_rows(self.scale)
        if self.rows is not None:
            w = self.rows
        return task if w is task.weight else dataclasses.replace(task, weight=w)

    def statistics(self, seen: Statistics) -> Statistics:
        """Return the statistics of the changed activation."""
        if self.scale is not None:
            inverse = 1 / self.scale
            seen = Statistics(
                scale_gram(seen.gram, self.scale),
                seen.tokens,
                None if seen.drift is None else scale_gram(seen.drift, self.scale),
                None if seen.magnitude is None else seen.magnitude * inverse,
                None if seen.absmax is None else seen.absmax * inverse,
            )
        if self.index is not None:
            index = self.index
            seen = Statistics(
                expand_gram(seen.gram, index),
                seen.tokens,
                None if seen.drift is None else expand_gram(seen.drift, index),
                None if seen.magnitude is None else _taken(seen.magnitude, index),
                None if seen.absmax is None else _taken(seen.absmax, index),
            )
        return seen

    def undo(self, q: QTensor, task: Task) -> QTensor:
        """Return the quantized weight with the change noted on it."""
        q = dataclasses.replace(
            q, dtype=jnp.dtype(task.weight.dtype), activation=task.rule.activation
        )
        scale = self.scale
        if scale is not None and self.index is None:
            inverse = task.along_rows(1 / scale)
            for axis in task.window:  # its positions share a channel's scale
                inverse = inverse[(slice(None),) * axis + (slice(1),)]
            q = dataclasses.replace(q, input_scale=inverse)
        if self.index is not None:
            inverse = None if scale is None else _taken(1 / scale, self.index)
            q = dataclasses.replace(
                q,
                input_scale=None if inverse is None else inverse[..., None],
                input_index=self.index.astype(jnp.int32)[..., None],
                rows=task.weight.shape[task.contracting[0]],
            )
        return q


def changes_for(
    transforms: Transforms, tasks: Sequence[Task], seen: Seen, judge: Judge
) -> dict[Key, Change]:
    """Return what transforms change for each consumer of one activation.

    Scales are the same for all of them, so that they can be folded into whatever
    produces the activation; channels are split for each weight by itself.
    """
    changes = {task.key: Change() for task in tasks}
    for name, options in transforms:
        row = TRANSFORMS[name]
        if row.kind == "scale":
            scale = _scale(row, dict(options), tasks, changes, seen, judge)
            changes = {key: change.scaled(scale) for key, change in changes.items()}
        else:
            changes = {
                task.key: _split(row, dict(options), task, changes[task.key])
                for task in tasks
            }
    return changes


def _scale(
    row: Transform,
    options: dict[str, Any],
    tasks: Sequence[Task],
    changes: Mapping[Key, Change],
    seen: Seen,
    judge: Judge,
) -> jax.Array:
    """Return the scale of least error among those that a transform proposes."""
    first = tasks[0]
    change = changes[first.key]
    if change.rows is not None:
        raise ValueError(
            f"{row.name!r} comes after a split, whose rows differ from weight to "
            f"weight: put it first in chain(...)"
        )
    statistics = change.statistics(first.fitted(seen.statistics()))
    statistics = by_channel(statistics, first)
    arguments = [getattr(statistics, name) for name in row.needs]
    weights = [channel_matrix(changes[t.key].task(t)) for t in tasks]
    candidates = row.candidates(weights, *arguments, first.group, **options)
    # the gram, which it scales on both sides, is whole on every device
    candidates = replicated(lambda scales: over_window(scales, first), candidates)
    if len(candidates) == 1:
        return candidates[0]

    def error(scale: jax.Array) -> float:
        """Round everything to nearest with this scale, and look at the block."""
        trial = {}
        for task in tasks:
            changed = changes[task.key].scaled(scale)
            q = searched(changed.task(task))
            trial[task.key] = changed.undo(q, task)
        return judge(trial)

    errors = [error(scale) for scale in candidates]
    return candidates[int(np.nanargmin(errors))]


def _split(
    row: Transform, options: dict[str, Any], task: Task, change: Change
) -> Change:
    """Return the change with the channels of one weight split."""
    last = len(task.weight.shape) - 2
    if task.contracting != (last,) or task.stacked != tuple(range(last)):
        raise ValueError(
            f"{row.name!r} needs a weight [..., inputs, outputs] whose inputs are "
            f"contracted, but {str(task.key)!r} of shape {tuple(task.weight.shape)} "
            f"contracts {task.contracting}: leave it out with a rule of its own"
        )
    rows, index = row.candidates(change.task(task).matrix(), task.spec, **options)
    return Change(change.scale, index, rows)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return ``x[..., index]``, each stacked index on its own."""
    return jnp.take_along_axis(x, index, axis=-1)
