"""Calibration data on its way through a program, one segment after the other."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.lift.program import Group, Key, Program
from jaxq.lift.segment import Segment
from jaxq.qtensor import QTensor

# from a weight to what stands for it: an array or a `QTensor`
Weights = Callable[[Key], Any]


@dataclasses.dataclass
class Batch:
    """One batch of calibration data, as far as the program has run.

    Attributes:
        program: the program for arguments of its shapes.
        values: the values that later segments need.
        mask: which tokens count, or None.
    """

    program: Program
    values: dict[Any, jax.Array]
    mask: jax.Array | None = None


@dataclasses.dataclass
class Stream:
    """All batches at the same place of the function.

    Every method leaves what it is given as it is: a stream can be advanced twice from
    the same place, with different weights.

    Attributes:
        batches: the data.
        compiled: one compiled function per kind of segment, shared by all streams.
        stage: how many segments have run.
    """

    batches: tuple[Batch, ...]
    compiled: dict[Any, Callable[..., Any]]
    stage: int = 0

    @property
    def program(self) -> Program:
        """The program of the first batch; those of the others have the same groups."""
        return self.batches[0].program

    def advance(self, weights: Weights) -> "Stream":
        """Run the next segment on every batch."""
        memo: dict[Key, Any] = {}

        def weight(key: Key) -> Any:
            if key not in memo:
                memo[key] = weights(key)
            return memo[key]

        done = tuple(self._advance(batch, weight) for batch in self.batches)
        return Stream(done, self.compiled, self.stage + 1)

    def _advance(self, batch: Batch, weight: Weights) -> Batch:
        segment, live = _stage(batch.program, self.stage)
        values = [_value(batch, v, weight) for v in segment.inputs]
        made = dict(zip(segment.outputs, self._run(segment, values), strict=True))
        kept = {v: made[v] if v in made else batch.values[v] for v in live}
        return Batch(batch.program, kept, batch.mask)

    def _run(self, segment: Segment, values: Sequence[Any]) -> list[jax.Array]:
        run = self.compiled.get(segment.structure)
        if run is None:
            run = self.compiled[segment.structure] = jax.jit(segment.run)
        return run(values)

    def take(self, count: int) -> "Stream":
        """Return the stream of the first batches only."""
        return Stream(self.batches[:count], self.compiled, self.stage)

    def activations(self, place: int) -> Iterator[tuple[Any, Any, Any]]:
        """Yield activation, mask and row counts of a meeting, batch by batch.

        Args:
            place: the meeting's number in the group that the last segment led to.
        """
        for batch in self.batches:
            meeting = batch.program.groups[self.stage - 1].meetings[place]
            x = _known(batch, meeting.activation)
            sizes = None if meeting.sizes is None else _known(batch, meeting.sizes)
            yield x, batch.mask, sizes

    def state(self) -> dict[str, np.ndarray]:
        """Return all values by name, to be written down."""
        return {
            f"{number}.{place}": np.asarray(batch.values[v])
            for number, batch in enumerate(self.batches)
            for place, v in enumerate(_stage(batch.program, self.stage - 1)[1])
        }

    def restore(self, stage: int, state: Mapping[str, np.ndarray]) -> "Stream":
        """Return the stream at another place, from what `state` gave there."""
        batches = []
        for number, batch in enumerate(self.batches):
            live = _stage(batch.program, stage - 1)[1]
            names = (f"{number}.{place}" for place in range(len(live)))
            values = {
                v: jnp.asarray(state[n]) for v, n in zip(live, names, strict=True)
            }
            batches.append(Batch(batch.program, values, batch.mask))
        return Stream(tuple(batches), self.compiled, stage)


def _stage(program: Program, stage: int) -> tuple[Segment, tuple[Any, ...]]:
    """Return a segment and the values that are needed after it."""
    if stage < len(program.groups):
        group: Group = program.groups[stage]
        return group.segment, group.live
    return program.last, program.last.outputs


def _known(batch: Batch, v: Any) -> Any:
    """Return a value that is an activation: it may be an input or a constant."""
    if v in batch.values:
        return batch.values[v]
    return jnp.asarray(batch.program.constants[v])


def _value(batch: Batch, v: Any, weight: Weights) -> Any:
    """Return an input of a segment."""
    program = batch.program
    if v in program.weights:
        return as_seen(weight(program.weights[v]), v.aval.dtype)
    if v in program.constants:
        value = program.constants[v]
        return np.int32(value) if isinstance(value, int) else value
    return batch.values[v]


def as_seen(leaf: Any, dtype: Any) -> Any:
    """Return a weight in the dtype in which the program sees its slices."""
    if isinstance(leaf, QTensor):
        return dataclasses.replace(leaf, dtype=jnp.dtype(dtype), name=None)
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)
