"""Float weights on their way in, quantized ones on their way out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.lift.program import Group, Key
from jaxq.pipeline.solve import Task, rounded, solve_task
from jaxq.plan import PlanRow
from jaxq.qtensor import QTensor


@dataclasses.dataclass
class Store:
    """The parameters of a model, read when they are needed.

    Attributes:
        leaves: by path: arrays, or what reads itself (`LazyArray`).
        rows: the plan, by path.
        skipped: parameters that no group of the program has, and why.
        lengths: how many slices a scanned parameter has, by path, for those that
            groups solve slice by slice.
        settled: quantized weights that are still needed.
        done: the paths of parameters that are finished.
        pending: finished slices of parameters that are not yet.
    """

    leaves: Mapping[str, Any]
    rows: Mapping[str, PlanRow]
    skipped: Mapping[str, str]
    lengths: Mapping[str, tuple[int, ...]]
    settled: dict[Key, QTensor] = dataclasses.field(default_factory=dict)
    done: set[str] = dataclasses.field(default_factory=set)
    pending: dict[str, dict[tuple[int, ...], QTensor]] = dataclasses.field(
        default_factory=dict
    )
    _ready: list[tuple[str, QTensor]] = dataclasses.field(default_factory=list)

    @property
    def needs_floats(self) -> bool:
        """Whether anybody asks what the float model computes."""
        rules = [row.rule for row in self.rows.values() if row.rule is not None]
        return any("drift" in r.needs or r.is_tuned for r in rules)

    @property
    def needs_results(self) -> bool:
        """Whether anybody asks what comes of the last block."""
        return any(
            row.rule is not None and row.rule.is_tuned for row in self.rows.values()
        )

    def read(self, key: Key) -> Any:
        """Return the float values of a weight.

        Raises:
            ValueError: when it is read from a file just now, and holds NaN or Inf.
        """
        leaf = self.leaves[key.path]
        values = read_leaf(leaf, key.index)
        if hasattr(leaf, "read") and not bool(jnp.all(jnp.isfinite(values))):
            raise ValueError(
                f"{str(key)!r} holds NaN or Inf: no scale can represent them. Repair "
                f"the checkpoint, or keep it float with Rule({key.path!r}, weight=None)"
            )
        return values

    def solves_any(self, groups: Sequence[Group]) -> bool:
        """Whether any weight of these groups is solved from data."""
        keys = (key for group in groups for key in group.keys)
        return any(key.path in self.rows and self._is_mine(key) for key in keys)

    def tasks(self, group: Group) -> dict[Key, Task]:
        """Return the weights of a group that are solved from data."""
        out = {}
        for key in group.keys:
            if key.path in self.rows and self._is_mine(key):
                out[key] = self.task(key)
        return out

    def task(self, key: Key) -> Task:
        """Return one weight's task."""
        return Task.of(key, self.rows[key.path], self.read(key))

    def is_tuned(self, key: Key) -> bool:
        """Whether a rule tunes the weight together with its block."""
        rule = self.rows[key.path].rule
        return rule is not None and rule.is_tuned

    def weight(self, key: Key) -> Any:
        """Return a weight as the quantized model has it; see `as_multiplied`."""
        if key in self.settled:
            q = self.settled[key]
            return as_multiplied(q) if self._is_mine(key) else q
        row = self.rows.get(key.path)
        if row is None or not row.is_quantized or row.rule is None:
            return self.read(key)
        if self._is_mine(key):  # a group will solve it: this is a look before
            return self.read(key)
        whole = Key(key.path)
        if whole not in self.settled:
            self.settled[whole] = self.solve_without_data(key.path)
        q = self.settled[whole]
        return jax.tree.map(lambda a: a[key.index], q) if key.index else q

    def float_weight(self, key: Key) -> Any:
        """Return a weight as the float model has it."""
        return self.read(key)

    def solve_without_data(self, path: str) -> QTensor:
        """Return a whole parameter, solved by a rule that needs no data."""
        row = self.rows[path]
        if row.rule is None:
            raise ValueError(f"{path!r} stays float: there is nothing to solve")
        whole = Task.of(Key(path), row, self.read(Key(path)))
        q = rounded(whole) if row.rule.needs_data else solve_task(whole, None).weight
        return dataclasses.replace(q, activation=row.rule.activation)

    def settle(self, key: Key, q: QTensor) -> None:
        """Take a solved weight; one of a tuned block may be settled again."""
        self.settled[key] = q

    def forget(self, groups: Sequence[Group]) -> None:
        """Let go of the weights of a finished block."""
        for group in groups:
            for key in group.keys:
                if key not in self.settled or not self._is_mine(key):
                    continue
                self._finish(key, self.settled.pop(key))

    def _is_mine(self, key: Key) -> bool:
        """Whether a group solves the weight from data."""
        row = self.rows[key.path]
        data = row.is_quantized and row.rule is not None and row.rule.needs_data
        return data and key.path not in self.skipped

    def _finish(self, key: Key, q: QTensor) -> None:
        """Keep a slice until its parameter is complete."""
        if not key.index:
            self._ready.append((key.path, q))
            return
        slices = self.pending.setdefault(key.path, {})
        slices[key.index] = q
        lengths = self.lengths[key.path]
        if len(slices) == int(np.prod(lengths)):
            self._ready.append((key.path, stacked(self.pending.pop(key.path), lengths)))

    def complete(self) -> Iterator[tuple[str, QTensor]]:
        """Yield the parameters that were finished since the last time."""
        for path, q in self._ready:
            self.done.add(path)
            yield path, q
        self._ready.clear()

    def rest(self) -> Iterator[tuple[str, Any]]:
        """Yield the parameters that no block has finished, quantized or as they are."""
        for path, leaf in self.leaves.items():
            if path in self.done:
                continue
            row = self.rows.get(path)
            if row is not None and row.is_quantized:
                known = self.settled.pop(Key(path), None)
                yield path, self.solve_without_data(path) if known is None else known
            else:
                yield path, leaf


def as_multiplied(q: QTensor) -> Any:
    """Return what stands for a weight in products: its numbers, where that is the same.

    As an array it runs what was compiled for the float one. Where the activation is
    quantized as well, only the tensor itself says how.
    """
    return q if q.activation is not None else _numbers(q)


@jax.jit
def _numbers(q: QTensor) -> jax.Array:
    return q.dequantize()


def read_leaf(leaf: Any, index: tuple[int, ...] = ()) -> Any:
    """Return the values of a leaf, or of a slice of it."""
    if hasattr(leaf, "read"):
        leaf = leaf.read()
    return (
        leaf if isinstance(leaf, jax.Array) and not index else jnp.asarray(leaf[index])
    )


def stacked(
    slices: Mapping[tuple[int, ...], QTensor], lengths: Sequence[int]
) -> QTensor:
    """Return one tensor of the slices along its leading axes."""
    rank = len(lengths)
    order = [slices[i] for i in np.ndindex(*lengths)]
    q = jax.tree.map(lambda *a: jnp.stack(a).reshape(*lengths, *a[0].shape), *order)
    return dataclasses.replace(q, block=(1,) * rank + q.block)
