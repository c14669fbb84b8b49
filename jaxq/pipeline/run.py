"""Carry a plan out: with data block after block, without data leaf after leaf."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxq.lift.program import Key, Program, program
from jaxq.lift.trace import Call, path_string
from jaxq.pipeline.evidence import Evidence
from jaxq.pipeline.journal import Journal
from jaxq.pipeline.oneshot import solve_in_one_shot
from jaxq.pipeline.sequential import run_blocks
from jaxq.pipeline.store import Store
from jaxq.pipeline.stream import Batch
from jaxq.plan import Plan, PlanRow, abstract_params
from jaxq.qtensor import QTensor

# (row that is done, how many are done, how many there are)
Progress = Callable[[PlanRow, int, int], None]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A function and the data to run it on.

    Attributes:
        fn: called as ``fn(params, *batch)``, or None.
        batches: tuples of its other arguments.
        masks: for every batch which tokens count; or None.
        blocks: patterns for paths, see `jaxq.lift.program`.
    """

    fn: Callable[..., Any] | None
    batches: Sequence[Sequence[Any]]
    masks: Iterable[jax.Array] | None = None
    blocks: tuple[str, ...] = ()


def named_leaves(params: Any) -> tuple[dict[str, Any], Any]:
    """Return the leaves by path, and the structure."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    return {path_string(path): leaf for path, leaf in flat}, treedef


def run_plan(
    todo: Plan,
    params: Any,
    data: Calibration,
    journal: Journal,
    progress: Progress | None = None,
) -> list[Evidence]:
    """Quantize what a plan says, and hand every finished parameter to the journal.

    Args:
        todo: the plan.
        params: the float parameters: arrays, or leaves that read themselves.
        data: what to calibrate on, if a rule needs data.
        journal: takes the parameters.
        progress: called after every parameter that is quantized.

    Raises:
        ValueError: when a rule needs data and there is none.
    """
    leaves, _ = named_leaves(params)
    rows = {row.path: row for row in todo.rows}
    told = _Told(journal, rows, len(todo.quantized), progress)
    needy = [row for row in todo.quantized if row.rule and row.rule.needs_data]
    evidence: list[Evidence] = []
    alone: list[Evidence] = []
    if needy:
        _refuse_without_data(needy, data)
        batches, skipped, lengths = _prepare(params, data, needy)
        store = Store(leaves, rows, skipped, lengths, done=set(journal.done))
        alone = solve_in_one_shot(store, params, data.fn, data.batches)
        evidence = run_blocks(batches, store, told)
    else:
        store = Store(leaves, rows, {}, {}, done=set(journal.done))
    known = {one.path: one for one in alone}
    start = time.perf_counter()
    for path, leaf in store.rest():
        told_of = None
        if isinstance(leaf, QTensor):
            spent, start = time.perf_counter() - start, time.perf_counter()
            told_of = known.get(path) or _of_rounding(rows[path], spent)
            evidence.append(told_of)
        told.put(path, leaf, told_of)
    return evidence


def _of_rounding(row: PlanRow, seconds: float) -> Evidence:
    """Return the evidence of a weight that no data was needed for."""
    method = "rtn" if row.rule is None else row.rule.method
    return Evidence(row.path, method, 0, seconds=seconds)


@dataclasses.dataclass
class _Told:
    """A journal that also tells of progress."""

    journal: Journal
    rows: Mapping[str, PlanRow]
    total: int
    progress: Progress | None
    count: int = 0

    def __post_init__(self) -> None:
        self.count = sum(self.rows[path].is_quantized for path in self.journal.done)

    @property
    def finished(self) -> int:
        return self.journal.finished

    @property
    def done(self) -> Iterable[str]:
        return self.journal.done

    def state(self) -> Mapping[str, Any]:
        return self.journal.state()

    def put(self, path: str, leaf: Any, evidence: Evidence | None = None) -> None:
        self.journal.put(path, leaf, evidence)
        if isinstance(leaf, QTensor):
            self._tell(path)

    def commit(
        self,
        block: str,
        leaves: Mapping[str, Any],
        state: Mapping[str, Any],
        evidence: Sequence[Evidence],
    ) -> None:
        self.journal.commit(block, leaves, state, evidence)
        for path in leaves:
            self._tell(path)

    def _tell(self, path: str) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(self.rows[path], self.count, self.total)


def _refuse_without_data(needy: Sequence[PlanRow], data: Calibration) -> None:
    """Raise when rules need data and there is none, or only abstract data."""
    row = needy[0]
    method = "" if row.rule is None else row.rule.method
    why = f"{row.path!r} is quantized by {method}, which needs calibration data"
    if row.rule is not None and row.rule.static:
        why = f"{row.path!r} gets a static activation scale, which needs data"
    if data.fn is None or not data.batches:
        raise ValueError(f"{why}: pass fn= and calibration=")
    arrays = jax.tree.leaves(data.batches[0])
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        raise ValueError(f"{why}, but the first batch has shapes and no numbers")
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        raise ValueError(
            f"{why}, and whether it is sound can only be seen outside jax.jit: call "
            f"quantize_params without jit"
        )


def _prepare(
    params: Any, data: Calibration, needy: Sequence[PlanRow]
) -> tuple[list[Batch], Mapping[str, str], dict[str, tuple[int, ...]]]:
    """Cut the function for the shapes of every batch."""
    assert data.fn is not None
    abstract = abstract_params(params)
    programs: dict[Any, Program] = {}
    masks = None if data.masks is None else list(data.masks)
    if masks is not None and len(masks) != len(data.batches):
        raise ValueError(
            f"masks= has {len(masks)} entries for {len(data.batches)} calibration "
            f"batches: give one for each, or None"
        )
    out = []
    for number, batch in enumerate(data.batches):
        call = Call.of((abstract, *batch), {})
        key = call.cache_key()
        if key is None or key not in programs:
            programs[key] = program(data.fn, abstract, *batch, blocks=data.blocks)
        found = programs[key]
        arrays = [call.leaves[i] for i in call.dynamic if call.arguments[i] != 0]
        values = dict(zip(found.inputs, arrays, strict=True))
        out.append(Batch(found, values, None if masks is None else masks[number]))
    first = out[0].program
    for found in programs.values():
        if [g.keys for g in found.groups] != [g.keys for g in first.groups]:
            raise ValueError(
                "the calibration batches lead through different products of the "
                "function: calibrate on batches of one kind"
            )
    wanted = {row.path for row in needy}
    skipped = {path: why for path, why in first.skipped.items() if path in wanted}
    skipped |= {row.path: row.rounds for row in needy if row.rounds}
    return out, skipped, _lengths(first)


def _lengths(found: Program) -> dict[str, tuple[int, ...]]:
    """Return how many slices each scanned parameter has."""
    largest: dict[str, Any] = {}
    for key in found.weights.values():
        if isinstance(key, Key) and key.index:
            index = np.asarray(key.index) + 1
            largest[key.path] = np.maximum(largest.get(key.path, index), index)
    return {path: tuple(map(int, n)) for path, n in largest.items()}
