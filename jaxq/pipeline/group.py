"""Solve the weights of one group: observe, re-parametrize, solve, keep the evidence."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift.program import Group, Key, Meeting
from jaxq.pipeline.activation import static_activation
from jaxq.pipeline.beside import solve_all
from jaxq.pipeline.evidence import Evidence, scarcity
from jaxq.pipeline.reparametrize import Change, Judge, changes_for
from jaxq.pipeline.rows import Layout
from jaxq.pipeline.solve import Task, losses, rounded
from jaxq.pipeline.statistics import Seen, check, observe
from jaxq.pipeline.stream import Stream
from jaxq.qtensor import QTensor
from jaxq.solvers import SOLVERS
from jaxq.solvers.base import Solved, Statistics

UNPAIRED = "the drift of its activation is not known: tokens are sorted by expert"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one weight.

    Attributes:
        weight: the quantized weight.
        evidence: what was done.
        compensated: the weight whose rounding gives the codes, for tuning; or None.
        statistics: what calibration saw, where the weight is tuned afterwards.
    """

    weight: QTensor
    evidence: Evidence
    compensated: jax.Array | None = None
    statistics: Statistics | None = None


def solve_group(
    group: Group,
    tasks: Mapping[Key, Task],
    stream: Stream,
    floats: Stream | None,
    judge: Judge,
) -> dict[Key, Outcome]:
    """Solve the weights of a group that the last segment led to.

    Args:
        group: the weights and the activations they meet.
        tasks: those of them that need data, by key.
        stream: calibration data after the quantized prefix.
        floats: the same of the float model, where a solver asks for the drift.
        judge: from weights that stand in for some of the group's to the error of the
            block's output, for transforms that search.
    """
    out: dict[Key, Outcome] = {}
    for places in _shared(group, tasks):
        start = time.perf_counter()
        meetings = [group.meetings[i] for i in places]
        seen = _observe(stream, places[0], floats, meetings)
        todo = {m.key: tasks[m.key] for m in meetings if m.key not in out}
        spent = (time.perf_counter() - start) / max(len(todo), 1)
        changes = _changes(list(todo.values()), seen, judge)
        solved, each = _solved(todo, seen, changes)
        for key, task in todo.items():
            outcome = _outcome(task, seen, changes[key], solved[key], stream, places[0])
            seconds = outcome.evidence.seconds + spent + each
            unpaired = floats is not None and meetings[0].product.groups > 0
            notes = (outcome.evidence.note, UNPAIRED if unpaired else None)
            evidence = dataclasses.replace(
                outcome.evidence,
                seconds=seconds,
                note="; ".join(filter(None, notes)) or None,
            )
            out[key] = dataclasses.replace(outcome, evidence=evidence)
    return out


def _shared(group: Group, tasks: Mapping[Key, Task]) -> list[list[int]]:
    """Return the meetings with the same activation, as numbers."""
    places: dict[Any, list[int]] = {}
    for i, m in enumerate(group.meetings):
        if m.key in tasks:
            place = (m.activation, m.sizes, Layout.of(m.product))
            places.setdefault(place, []).append(i)
    return list(places.values())


def _observe(
    stream: Stream, place: int, floats: Stream | None, meetings: Sequence[Meeting]
) -> Seen:
    seen, bad = observe(stream, place, floats)
    check(seen, bad, meetings, len(stream.batches))
    return seen


def _changes(tasks: Sequence[Task], seen: Seen, judge: Judge) -> dict[Key, Change]:
    """Return what transforms change; consumers of one activation share the scale."""
    out: dict[Key, Change] = {}
    for transforms in dict.fromkeys(t.rule.transforms for t in tasks):
        mine = [t for t in tasks if t.rule.transforms == transforms]
        out |= changes_for(transforms, mine, seen, judge)
    return out


def _solved(
    tasks: Mapping[Key, Task], seen: Seen, changes: Mapping[Key, Change]
) -> tuple[dict[Key, Solved], float]:
    """Solve weights in changed coordinates; return also the seconds that each took."""
    start = time.perf_counter()
    known = {key: task.fitted(seen.statistics()) for key, task in tasks.items()}
    solved = solve_all(
        {key: changes[key].task(task) for key, task in tasks.items()},
        {key: changes[key].statistics(statistics) for key, statistics in known.items()},
    )
    jax.block_until_ready([one.info for one in solved.values()])
    return solved, (time.perf_counter() - start) / max(len(tasks), 1)


def _outcome(
    task: Task, seen: Seen, change: Change, solved: Solved, stream: Stream, place: int
) -> Outcome:
    """Bring a solved weight back to its own coordinates, with the evidence."""
    start = time.perf_counter()
    statistics = task.fitted(seen.statistics())
    changed = change.task(task)
    q, fallback, compensated = solved.weight, None, solved.compensated
    ok = solved.info.get("ok")
    if ok is not None and not bool(jnp.all(ok)):
        fallback = _why(task, statistics, ok)
        if not task.stack:
            q, compensated = rounded(changed), None
    q = change.undo(q, task)
    q = static_activation(q, task, change, stream, place)
    loss, near = losses(task, q, statistics)
    # feature groups of a convolution see as many patches each
    each = jnp.ravel(statistics.tokens) if task.stacked else ()
    experts = tuple(int(n) for n in each)
    idle = [i for i, n in enumerate(experts) if n == 0]
    if idle and fallback is None:
        fallback = _idle(idle)
    damping = solved.info.get("damping")
    tokens = int(jnp.sum(seen.tokens)) // task.groups
    evidence = Evidence(
        str(task.key),
        task.rule.method,
        tokens,
        float(loss),
        float(near),
        None if damping is None else float(jnp.max(damping)),
        dict(task.rule.options).get("order", _order(task.rule.solver)),
        time.perf_counter() - start,
        fallback,
        scarcity(tokens, statistics.gram.shape[-1], experts),
        experts,
    )
    kept = statistics if task.rule.is_tuned else None
    return Outcome(q, evidence, compensated, kept)


def _order(solver: str) -> str | None:
    """Return the order that a solver takes when a rule says nothing."""
    return SOLVERS[solver].order


def _why(task: Task, statistics: Any, ok: jax.Array) -> str:
    """Say why a Gram matrix was not used."""
    finite = bool(jnp.all(jnp.isfinite(statistics.gram)))
    what = "could not be factored, however it was damped" if finite else "is not finite"
    flags = [i for i, fine in enumerate(jnp.ravel(ok)) if not bool(fine)]
    if not task.stack:
        return f"rounded to nearest: its Gram matrix {what}"
    idle = [i for i in flags if int(jnp.ravel(statistics.tokens)[i]) == 0]
    if idle == flags:
        return _idle(idle)
    kind = "experts" if task.stacked else "feature groups"
    shown = ", ".join(map(str, flags[:8])) + (", ..." if len(flags) > 8 else "")
    return f"{kind} {shown} rounded to nearest: their Gram matrix {what}"


def _idle(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    return f"rounded to nearest where no token came: experts {shown}"
