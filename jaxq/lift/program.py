"""`Program`: a function cut at its products, to be run from one to the next.

A program is a straight list of segments. Between two segments stands a group of weights
whose products do not depend on each other (query, key and value; gate and up): their
activations are known before any of them is used, so the group can be observed, solved
and then run in its quantized form, without anything being computed twice.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax.extend import core as jexc

from jaxq.lift.product import Product
from jaxq.lift.segment import Segment
from jaxq.lift.unroll import ACTIVATION, SLICE, Flat, flatten

LOOKED_UP = "it is looked up, not multiplied with"
CLOSED = "its product is inside a loop or a branch"


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """A weight of its own: a parameter, or one step's slice of a scanned one.

    Attributes:
        path: the parameter's path.
        index: one number per enclosing scan.
    """

    path: str
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return ``path`` or ``path[3]``."""
        return self.path + "".join(f"[{i}]" for i in self.index)


@dataclasses.dataclass(frozen=True, eq=False)
class Meeting:
    """A weight of a group and the activation it is multiplied with.

    Attributes:
        key: the weight.
        product: how it is multiplied.
        activation: the value of the program that it meets.
        mark: the same value, as the product takes it.
        sizes: the value that says how many rows each expert gets (``ragged_dot``).
    """

    key: Key
    product: Product
    activation: Any
    mark: Any
    sizes: Any = None

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of the program that must be known to observe it."""
        found = (self.activation, self.sizes)
        return tuple(v for v in found if v is not None and _is_var(v))


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Weights that are solved together, and the segment that leads to them.

    Attributes:
        block: the name of the block they belong to.
        meetings: their products.
        segment: computes the activations of all of them.
        live: the values that must be kept until the next segment.
    """

    block: str
    meetings: tuple[Meeting, ...]
    segment: Segment
    live: tuple[Any, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The weights of the group, each once."""
        return tuple(dict.fromkeys(m.key for m in self.meetings))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function cut at its products.

    Attributes:
        flat: the whole of it.
        groups: in the order of execution.
        last: the segment behind the last group, which makes the results.
        skipped: parameters that stand in no group, by path, and why.
        weights: the program's values that are weights.
        constants: values that are known beforehand.
        inputs: the values that the function's other arguments become.
    """

    flat: Flat
    groups: tuple[Group, ...]
    last: Segment
    skipped: Mapping[str, str]
    weights: Mapping[Any, Key]
    constants: Mapping[Any, Any]
    inputs: tuple[Any, ...]

    @property
    def blocks(self) -> tuple[tuple[str, tuple[Group, ...]], ...]:
        """The groups of each block, in order."""
        out: list[tuple[str, list[Group]]] = []
        for group in self.groups:
            if not out or out[-1][0] != group.block:
                out.append((group.block, []))
            out[-1][1].append(group)
        return tuple((name, tuple(groups)) for name, groups in out)


def program(
    fn: Callable[..., Any],
    params: Any,
    *example: Any,
    targets: Callable[[str], bool] = lambda path: True,
    blocks: Sequence[str] = (),
    **kwargs: Any,
) -> Program:
    """Cut ``fn(params, *example)`` at the products of its weights.

    Args:
        fn: any function that `jax.jit` could trace.
        params: its first argument: arrays or abstract ones.
        *example: its other arguments.
        targets: which parameters (by path) to cut at.
        blocks: patterns (regular expressions) for paths; weights for which one finds
            the same text are a block. By default the path up to its first number:
            ``params/layers_3/mlp/up`` is of ``params/layers_3``.
        **kwargs: its keyword arguments.
    """
    flat = flatten(fn, params, *example, **kwargs)
    return _Cut.of(flat, targets, blocks).program()


def block_name(key: Key, patterns: Sequence[str]) -> str:
    """Return the name of the block that a weight belongs to."""
    for pattern in patterns:
        found = re.search(pattern, key.path)
        if found:
            return found.group(0) + "".join(f"[{i}]" for i in key.index)
    if key.index:
        return "step " + ".".join(map(str, key.index))
    found = re.match(r"(?:[^/]*/)*?[^/]*\d+(?=/)", key.path)
    return found.group(0) if found else key.path


@dataclasses.dataclass(eq=False)
class _Cut:
    """The making of a program."""

    flat: Flat
    targets: Callable[[str], bool]
    patterns: Sequence[str]
    weights: dict[Any, Key]
    constants: dict[Any, Any]
    inputs: tuple[Any, ...]
    sizes: dict[Any, Any]
    results: dict[Any, Sequence[Any]]
    order: dict[Any, int]
    skipped: dict[str, str]

    @classmethod
    def of(
        cls, flat: Flat, targets: Callable[[str], bool], patterns: Sequence[str]
    ) -> "_Cut":
        jaxpr, call = flat.jaxpr.jaxpr, flat.call
        constants = dict(zip(jaxpr.constvars, flat.jaxpr.consts, strict=True))
        invars = jaxpr.invars[: len(jaxpr.invars) - flat.steps]
        numbers = jaxpr.invars[len(invars) :]
        constants.update((v, i) for i, v in enumerate(numbers))
        weights: dict[Any, Key] = {}
        inputs = []
        for v, i in zip(invars, call.dynamic, strict=True):
            if call.arguments[i] == 0:
                weights[v] = Key(call.paths[i])
            else:
                inputs.append(v)
        sizes: dict[Any, Any] = {}
        results: dict[Any, Sequence[Any]] = {}
        order = {v: i for i, v in enumerate(jaxpr.invars)}
        for eqn in jaxpr.eqns:
            order.update((v, len(order)) for v in eqn.outvars)
            number = _marked(eqn, SLICE)
            if number is not None:
                weights[eqn.outvars[0]] = Key(*flat.slices[number])
            results.update((v, eqn.outvars) for v in eqn.invars if _is_var(v))
            if eqn.primitive.name.startswith("ragged_dot"):
                sizes[eqn.invars[0]] = eqn.invars[2]
        return cls(
            flat,
            targets,
            patterns,
            weights,
            constants,
            tuple(inputs),
            sizes,
            results,
            order,
            {},
        )

    def program(self) -> Program:
        """Cut, and drop from the groups what would stand in several of them."""
        for product in self.flat.products:
            if product.whole is not None:
                self.skipped[product.use.path] = product.whole
        groups = self._groups()
        places: dict[Key, set[int]] = {}
        for i, meetings in enumerate(groups):
            for m in meetings:
                places.setdefault(m.key, set()).add(i)
        several = {key: len(at) for key, at in places.items() if len(at) > 1}
        for key, count in several.items():
            self.skipped[key.path] = f"{count} products at different places share it"
        if several:
            groups = self._groups()
        return self._segments(groups)

    def _groups(self) -> list[list[Meeting]]:
        """Return the meetings of each group: as early as possible, in order."""
        groups: list[list[Meeting]] = []
        tainted: set[Any] = set()
        name = None
        for eqn in self.flat.jaxpr.eqns:
            number = _marked(eqn, ACTIVATION)
            meeting = None if number is None else self._meeting(number, eqn)
            if meeting is not None:
                x, block = meeting.activation, block_name(meeting.key, self.patterns)
                # consumers of one activation are solved together, whatever their names
                known = groups and any(m.activation is x for m in groups[-1])
                if not known and (not groups or x in tainted or block != name):
                    groups.append([])
                    tainted.clear()
                    name = block
                groups[-1].append(meeting)
                tainted.update(eqn.outvars)
            elif any(_is_var(v) and v in tainted for v in eqn.invars):
                tainted.update(eqn.outvars)
        return groups

    def _meeting(self, number: int, eqn: Any) -> Meeting | None:
        """Return the product that a mark is about, if its weight is to be solved."""
        product = self.flat.products[number]
        key = Key(product.use.path, product.index)
        if not self.targets(key.path) or key.path in self.skipped:
            return None
        sizes = self.sizes.get(eqn.outvars[0])
        return Meeting(key, product, eqn.invars[0], eqn.outvars[0], sizes)

    def _segments(self, groups: list[list[Meeting]]) -> Program:
        """Give every equation to the first segment that needs it."""
        jaxpr = self.flat.jaxpr.jaxpr
        done: set[int] = set()
        goals = [[v for m in group for v in m.values] for group in groups]
        goals.append(list(jaxpr.outvars))
        # a group's products run right behind it, so that its weights can be let go
        used = self._used()
        also = [
            [v for m in group for v in self.results[m.mark] if v in used]
            for group in groups
        ]
        pairs = zip(goals, [[], *also], strict=True)
        bodies = [self._ancestors([*goal, *more], done) for goal, more in pairs]
        segments, lives = [], []
        needed: set[Any] = set()
        for body, goal in zip(reversed(bodies), reversed(goals), strict=True):
            needed |= {v for v in goal if _is_var(v)}
            lives.append(needed)
            made = {v for eqn in body for v in eqn.outvars}
            outs = [v for eqn in body for v in eqn.outvars if v in needed]
            segments.append(Segment.of(body, outs, jaxpr.debug_info))
            used = {v for eqn in body for v in eqn.invars if _is_var(v)}
            needed = (needed - made) | {v for v in used - made if self._moves(v)}
        segments.reverse()
        lives.reverse()
        parts = zip(groups, segments, lives, strict=False)
        return Program(
            self.flat,
            tuple(
                Group(
                    block_name(group[0].key, self.patterns),
                    tuple(group),
                    segment,
                    tuple(
                        sorted(filter(self._moves, live), key=self.order.__getitem__)
                    ),
                )
                for group, segment, live in parts
            ),
            segments[-1],
            self._all_skipped(groups),
            self.weights,
            self.constants,
            self.inputs,
        )

    def _kept(self, live: set[Any]) -> tuple[Any, ...]:
        """Return the values to keep, in the order in which they are made."""
        return tuple(sorted(filter(self._moves, live), key=lambda v: self.order[v]))

    def _used(self) -> set[Any]:
        """Return the values that the function's results depend on."""
        body = self._ancestors(self.flat.jaxpr.jaxpr.outvars, set())
        return {v for eqn in body for v in eqn.outvars}

    def _moves(self, v: Any) -> bool:
        """Whether a value differs from batch to batch."""
        return v not in self.weights and v not in self.constants

    def _ancestors(self, goal: Iterable[Any], done: set[int]) -> list[Any]:
        """Return what must be run for ``goal``, in order, and mark it as done."""
        wanted = {v for v in goal if _is_var(v)}
        body = []
        eqns = self.flat.jaxpr.eqns
        for i in range(len(eqns) - 1, -1, -1):
            eqn = eqns[i]
            if i in done or not any(v in wanted for v in eqn.outvars):
                continue
            if any(v in self.weights for v in eqn.outvars):
                continue
            done.add(i)
            body.append(eqn)
            wanted.update(v for v in eqn.invars if _is_var(v))
        return body[::-1]

    def _all_skipped(self, groups: list[list[Meeting]]) -> dict[str, str]:
        """Return all target parameters that no group has, and why."""
        out = {path: why for path, why in self.skipped.items() if self.targets(path)}
        grouped = {m.key.path for group in groups for m in group}
        for use in self.flat.uses:
            known = use.path in grouped or use.path in out
            if use.is_site and not known and self.targets(use.path):
                looked_up = use.op == "gather"
                out[use.path] = LOOKED_UP if looked_up else CLOSED
        return out


def _marked(eqn: Any, prefix: str) -> int | None:
    """Return the number in an equation's mark, if it has one of this kind."""
    if eqn.primitive.name != "name":
        return None
    name = eqn.params["name"]
    return int(name.removeprefix(prefix)) if name.startswith(prefix) else None


def _is_var(v: Any) -> bool:
    return not isinstance(v, jexc.Literal)
