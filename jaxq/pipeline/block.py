"""A block of a program as one function: weights and inputs in, outputs out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.lift.program import Key, Program
from jaxq.lift.segment import Segment
from jaxq.pipeline.stream import Batch, Weights, as_seen


@dataclasses.dataclass(frozen=True, eq=False)
class BlockFunction:
    """The segments of one block, put together.

    Two blocks of the same structure are equal, so that what is compiled for one serves
    the other.

    Attributes:
        segment: all equations of the block.
        tuned: the places among its inputs of the weights that are tuned, by name.
        fixed: the places of what is the same for all batches, by name.
        moving: the places of what differs from batch to batch.
    """

    segment: Segment
    tuned: tuple[tuple[str, int], ...]
    fixed: tuple[tuple[str, int], ...]
    moving: tuple[int, ...]

    def __hash__(self) -> int:
        """Hash the structure."""
        return hash((self.segment.structure, self.tuned, self.fixed))

    def __eq__(self, other: object) -> bool:
        """Whether both compute the same of the same."""
        return (
            isinstance(other, BlockFunction)
            and self.segment.structure == other.segment.structure
            and (self.tuned, self.fixed) == (other.tuned, other.fixed)
        )

    def __call__(
        self, weights: Mapping[str, jax.Array], x: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Return the block's outputs for one batch."""
        values: list[Any] = [None] * len(self.segment.inputs)
        for name, place in (*self.tuned, *self.fixed):
            dtype = self.segment.inputs[place].aval.dtype
            values[place] = as_seen(weights[name], dtype)
        for place, value in zip(self.moving, x, strict=True):
            values[place] = value
        return self.segment.run(values)


def block_function(
    program: Program, first: int, last: int, tuned: Sequence[Key]
) -> tuple[BlockFunction, dict[str, Key]]:
    """Return the function of the groups ``first .. last``, and its names' weights.

    Args:
        program: the whole.
        first: the number of the block's first group; its activations are inputs.
        last: the number of its last group; what comes of its products are outputs.
        tuned: the weights that are arguments.
    """
    parts = [*(group.segment for group in program.groups), program.last]
    eqns = [e for part in parts[first + 1 : last + 2] for e in part.jaxpr.eqns]
    outputs = _outputs(program, eqns, last, tuned)
    whole = Segment.of(eqns, outputs, program.flat.jaxpr.jaxpr.debug_info)
    names, fixed, moving = {}, [], []
    places = []
    for place, v in enumerate(whole.inputs):
        key = program.weights.get(v)
        if key in tuned:
            names[f"w{len(names)}"] = key
            places.append((f"w{len(names) - 1}", place))
        elif key is not None or v in program.constants:
            fixed.append((f"f{len(fixed)}", place))
        else:
            moving.append(place)
    function = BlockFunction(whole, tuple(places), tuple(fixed), tuple(moving))
    return function, names


def fixed_values(
    function: BlockFunction, program: Program, weights: Weights
) -> dict[str, Any]:
    """Return what is the same for all batches, by name."""
    out = {}
    for name, place in function.fixed:
        v = function.segment.inputs[place]
        key = program.weights.get(v)
        if key is not None:
            out[name] = as_seen(weights(key), v.aval.dtype)
        else:
            value = program.constants[v]
            out[name] = jnp.asarray(
                np.int32(value) if isinstance(value, int) else value
            )
    return out


def moving_values(function: BlockFunction, batch: Batch) -> list[jax.Array]:
    """Return what a batch gives the block."""
    return [batch.values[function.segment.inputs[i]] for i in function.moving]


def output_values(function: BlockFunction, batch: Batch) -> list[jax.Array]:
    """Return the block's outputs among the values of a batch that is behind it."""
    return [batch.values[v] for v in function.segment.outputs]


def _outputs(
    program: Program, eqns: Sequence[Any], last: int, keys: Sequence[Key]
) -> list[Any]:
    """Return what the block hands on: values that depend on its weights.

    The next group's activations are left out where they only norm what is handed on
    anyway: the error of the stream itself is what later blocks inherit.
    """
    weights = {v for v, key in program.weights.items() if key in keys}
    tainted = set(weights)
    for eqn in eqns:
        if any(_tainted(v, tainted) for v in eqn.invars):
            tainted.update(eqn.outvars)
    made = {v for eqn in eqns for v in eqn.outvars} & tainted
    if last + 1 < len(program.groups):
        after = program.groups[last + 1]
        live, heads = after.live, {v for m in after.meetings for v in m.values}
    else:
        live, heads = program.last.outputs, set()
    mine = [v for v in live if v in made and jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    return [v for v in mine if v not in heads] or mine


def _tainted(v: Any, tainted: set[Any]) -> bool:
    return not hasattr(v, "val") and v in tainted
