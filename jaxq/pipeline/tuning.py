"""Tune the weights of a block together, so that its output is the float block's."""

import dataclasses
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.explicit_axes import explicit_mesh
from jaxq.lift.program import Group, Key
from jaxq.pipeline.block import (
    BlockFunction,
    block_function,
    fixed_values,
    moving_values,
    output_values,
)
from jaxq.pipeline.group import Outcome
from jaxq.pipeline.solve import Task, losses
from jaxq.pipeline.store import Store
from jaxq.pipeline.stream import Batch, Stream
from jaxq.solvers.autoround import Problem, Samples, Settings, tune

STEP_TOKENS = 1024
# every so manieth batch takes part in no step, and says which iterate is the best
HELD = 16


def tune_block(
    groups: Sequence[Group],
    outcomes: Mapping[Key, Outcome],
    begin: Stream,
    targets: Stream,
    store: Store,
) -> dict[Key, Outcome]:
    """Return better weights for a block, from those that its solvers found.

    Args:
        groups: of the block.
        outcomes: the weights that rules tune.
        begin: the calibration data at the block's first group, after the quantized
            prefix.
        targets: the float model's data behind the block.
        store: reads float weights.
    """
    start = time.perf_counter()
    program = begin.program
    first = program.groups.index(groups[0])
    function, names = block_function(
        program, first, first + len(groups) - 1, tuple(outcomes)
    )
    # batches of other shapes than the first's would have to be compiled again
    pairs = zip(begin.batches, targets.batches, strict=True)
    same = [(b, t) for b, t in pairs if b.program is program]
    seen, held = parted(same)
    tasks = {key: store.task(key) for key in outcomes}
    data = [list(batch.values.values()) for batch, _ in seen]
    _check_mesh(groups[0].block, [task.weight for task in tasks.values()], data)
    samples = _samples(function, seen)
    problems = {
        name: Problem(_base(tasks[key], outcomes[key]), outcomes[key].weight)
        for name, key in names.items()
    }
    rule = next(iter(tasks.values())).rule
    tuned = tune(
        function,
        problems,
        samples,
        _settings(dict(rule.options), samples),
        fixed=fixed_values(function, program, store.weight),
        held=_samples(function, held) if held else None,
        key=jax.random.key(zlib.crc32(groups[0].block.encode())),
    )
    out = dict(outcomes)
    before, after = float(tuned.start_loss), float(tuned.best_loss)
    seconds = (time.perf_counter() - start) / len(names)
    for name, key in names.items():
        old = outcomes[key]
        q = dataclasses.replace(
            tuned.weights[name],
            activation=old.weight.activation,
            dtype=old.weight.dtype,
        )
        loss = old.evidence.loss
        if old.statistics is not None:
            loss = float(losses(tasks[key], q, old.statistics)[0])
        evidence = dataclasses.replace(
            old.evidence,
            loss=loss,
            seconds=old.evidence.seconds + seconds,
            block_loss=(before, after),
        )
        out[key] = Outcome(q, evidence)
    return out


def _settings(options: Mapping[str, Any], samples: Samples) -> Settings:
    """Return those of a rule's options that are about tuning.

    A step sees the batches that together hold `STEP_TOKENS`, however the data is cut.
    """
    known = {field.name for field in dataclasses.fields(Settings)}
    chosen = {k: v for k, v in options.items() if k in known}
    if "batch" not in chosen:
        largest = max(jax.tree.leaves(samples.targets), key=lambda a: a.size)
        tokens = math.prod(largest.shape[1:-1])
        chosen["batch"] = max(1, -(-STEP_TOKENS // max(tokens, 1)))
    return Settings(**chosen)


def _base(task: Task, outcome: Outcome) -> jax.Array:
    """Return what is rounded: what the solver compensated, else the float weight."""
    if outcome.compensated is not None:
        return outcome.compensated
    return jnp.asarray(task.weight, jnp.float32)


def parted(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the batches to tune on, and those that judge; too few all do both.

    Example:
        >>> seen, held = parted(range(40))
        >>> len(seen), held
        (38, [15, 31])
    """
    held = list(batches[HELD - 1 :: HELD])
    return [b for i, b in enumerate(batches) if i % HELD != HELD - 1], held


def _check_mesh(block: str, *arrays: Any) -> None:
    """Raise `ValueError` where arrays lie on a mesh with explicit axes."""
    mesh = explicit_mesh(*arrays)
    if mesh is not None:
        raise ValueError(
            f"block tuning of {block!r}: its weights or its data lie on the mesh "
            f"{dict(mesh.shape)} with explicit axes, where it cannot be done; make the "
            "mesh with axis_types=(jax.sharding.AxisType.Auto, ...), or leave the "
            "tuning out"
        )


def token_weights(target: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return how much each token's squares count: by one over their mean.

    What comes next norms every token, so it is the error relative to the token's own
    size that is felt. Sizes below a thousandth of the median count as that.

    Args:
        target: ``[B, ..., C]``, tokens of ``C`` channels.
        mask: ``[B, ...]``, which tokens count at all; of another shape: all do.

    Returns:
        float32, the shape of ``target`` without its last axis.
    """
    if target.ndim < 2:
        return jnp.ones(target.shape)
    sizes = jnp.mean(jnp.square(target.astype(jnp.float32)), -1)
    counts = jnp.ones_like(sizes)
    if mask is not None and mask.shape == sizes.shape[: mask.ndim]:
        counts = counts * mask.reshape(mask.shape + (1,) * (sizes.ndim - mask.ndim))
    usual = jnp.nanmedian(jnp.where(counts > 0, sizes, jnp.nan))
    least = jnp.where(usual > 0, 1e-3 * usual, 1.0)
    return counts / jnp.maximum(sizes, least)


def _samples(function: BlockFunction, pairs: Sequence[tuple[Batch, Batch]]) -> Samples:
    """Stack what the block is given, and what the float model has behind it."""
    inputs = _stacked([moving_values(function, batch) for batch, _ in pairs])
    targets = _stacked([output_values(function, batch) for _, batch in pairs])
    mask = _mask([batch.mask for batch, _ in pairs])
    return Samples(inputs, targets, [token_weights(y, mask) for y in targets])


def _stacked(batches: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *batches)


def _mask(masks: Sequence[Any]) -> jax.Array | None:
    if all(m is None for m in masks):
        return None
    return jnp.stack([jnp.asarray(m, jnp.float32) for m in masks])
