"""Calibrate block after block, each on what the quantized blocks before it compute."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxq.heap import give_back
from jaxq.lift.program import Group, Key
from jaxq.pipeline.evidence import Evidence
from jaxq.pipeline.group import Outcome, solve_group
from jaxq.pipeline.journal import Journal
from jaxq.pipeline.judge import Judge
from jaxq.pipeline.store import Store
from jaxq.pipeline.stream import Batch, Stream
from jaxq.pipeline.tuning import tune_block


@dataclasses.dataclass
class Place:
    """Both streams at the same place of the function.

    Attributes:
        stream: after the quantized prefix.
        floats: after the float one, or None when nobody asks for it.
    """

    stream: Stream
    floats: Stream | None


def run_blocks(
    batches: Sequence[Batch],
    store: Store,
    journal: Journal,
    progress: Callable[[Key], None] = lambda key: None,
) -> list[Evidence]:
    """Solve every weight that needs data, in the order in which the function uses it.

    Args:
        batches: the calibration data, at the beginning of the function.
        store: reads float weights and keeps quantized ones.
        journal: is told of every finished block, and knows those of an earlier run.
        progress: called after every weight.

    Returns:
        The evidence of the blocks that this run solved.
    """
    blocks = batches[0].program.blocks
    first, here = _start(batches, store, journal)
    evidence: list[Evidence] = []
    for name, groups in blocks[first:]:
        outcomes, here = _run_block(groups, here, store, progress)
        if not outcomes:  # a block that no rule solves from data
            continue
        mine = [outcome.evidence for outcome in outcomes.values()]
        journal.commit(name, dict(store.complete()), _state(here), mine)
        evidence += mine
        give_back()
    return evidence


def _start(
    batches: Sequence[Batch], store: Store, journal: Journal
) -> tuple[int, Place]:
    """Return the number of the first block to run, and the streams at it."""
    stream = Stream(tuple(batches), {})
    floats = stream if store.needs_floats else None
    if not journal.finished:
        return 0, _advance(Place(stream, floats), store)
    blocks = stream.program.blocks
    solved = [i for i, (_, groups) in enumerate(blocks) if store.solves_any(groups)]
    first = solved[journal.finished - 1] + 1
    stage = 1 + sum(len(groups) for _, groups in blocks[:first])
    if stage > len(stream.program.groups):
        return first, Place(stream, floats)
    state = journal.state()
    mine = {k[2:]: v for k, v in state.items() if k.startswith("q/")}
    theirs = {k[2:]: v for k, v in state.items() if k.startswith("f/")}
    if floats is not None:
        floats = floats.restore(stage, theirs)
    return first, Place(stream.restore(stage, mine), floats)


def _state(here: Place) -> dict[str, Any]:
    """Return what a later run must know to go on from here."""
    if here.stream.stage > len(here.stream.program.groups):
        return {}
    state = {f"q/{k}": v for k, v in here.stream.state().items()}
    if here.floats is not None:
        state |= {f"f/{k}": v for k, v in here.floats.state().items()}
    return state


def _run_block(
    groups: Sequence[Group],
    here: Place,
    store: Store,
    progress: Callable[[Key], None],
) -> tuple[dict[Key, Outcome], Place]:
    """Solve the groups of one block, then tune them together where rules say so."""
    begin, outcomes = here, {}
    for number, group in enumerate(groups):
        tasks = store.tasks(group)
        solved: dict[Key, Outcome] = {}
        if tasks:
            judge = Judge(here.stream, len(groups) - number, store)
            solved = solve_group(group, tasks, here.stream, here.floats, judge)
        for key, outcome in solved.items():
            store.settle(key, outcome.weight)
            progress(key)
        outcomes |= solved
        here = _advance(here, store)
    tuned = {k: o for k, o in outcomes.items() if store.is_tuned(k)}
    if tuned and here.floats is not None:
        outcomes |= tune_block(groups, tuned, begin.stream, here.floats, store)
        for key in tuned:
            store.settle(key, outcomes[key].weight)
        stream = begin.stream
        for _ in groups:
            stream = _next(stream, store, store.weight)
        here = Place(stream, here.floats)
    store.forget(groups)
    return outcomes, here


def _advance(here: Place, store: Store) -> Place:
    """Run the next segment on both streams."""
    floats = here.floats
    if floats is not None:
        floats = _next(floats, store, store.float_weight)
    return Place(_next(here.stream, store, store.weight), floats)


def _next(stream: Stream, store: Store, weights: Callable[[Key], Any]) -> Stream:
    """Run the next segment; only tuning needs the results of the last one."""
    if stream.stage < len(stream.program.groups) or store.needs_results:
        return stream.advance(weights)
    return dataclasses.replace(stream, stage=stream.stage + 1)
