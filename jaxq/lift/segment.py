"""`Segment`: a run of equations as a function, recognized when it comes again.

The layers of a model are the same equations over and over. Two segments of equal
`structure` compute the same function of their inputs, so one compilation serves both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jexc

from jaxq.lift.replay import Replay
from jaxq.lift.unroll import ACTIVATION, SLICE


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A run of equations.

    Attributes:
        inputs: the values it needs, in the order of their first use.
        outputs: the values it makes for later.
        jaxpr: the equations as a function from ``inputs`` to ``outputs``.
        structure: equal for segments that compute the same.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    jaxpr: jexc.Jaxpr
    structure: Any

    @classmethod
    def of(
        cls, eqns: Sequence[Any], outputs: Sequence[Any], debug_info: Any
    ) -> "Segment":
        """Put equations together, given the values that are wanted of them."""
        made = {v for eqn in eqns for v in eqn.outvars}
        used = [v for eqn in eqns for v in eqn.invars if not _is_literal(v)]
        inputs = tuple(dict.fromkeys(v for v in used if v not in made))
        outputs = tuple(dict.fromkeys(outputs))
        effects = frozenset().union(*(eqn.effects for eqn in eqns))
        jaxpr = jexc.Jaxpr(
            (), list(inputs), list(outputs), list(eqns), effects, debug_info=debug_info
        )
        return cls(inputs, outputs, jaxpr, structure(jaxpr))

    def run(self, values: Sequence[Any]) -> list[jax.Array]:
        """Return the outputs, given the inputs: arrays, or `QTensor` weights."""
        replay = Replay(self.jaxpr.debug_info)
        return replay.arrays(replay.run(self.jaxpr, values), "output")


def structure(jaxpr: Any, consts: Sequence[Any] = ()) -> Any:
    """Return a hashable value that is equal for jaxprs that compute the same."""
    numbers: dict[Any, int] = {}

    def name(v: Any) -> Any:
        if _is_literal(v):
            return (str(v.aval), np.asarray(v.val).tobytes())
        return numbers.setdefault(v, len(numbers))

    def typed(v: Any) -> Any:
        return (name(v), str(v.aval))

    heads = tuple(typed(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            eqn.primitive,
            tuple(map(name, eqn.invars)),
            tuple((key, _plain(key, value)) for key, value in eqn.params.items()),
            tuple(map(typed, eqn.outvars)),
        )
        for eqn in jaxpr.eqns
    )
    results = tuple(map(name, jaxpr.outvars))
    return (heads, body, results, tuple(map(_constant, consts)))


def _plain(key: str, value: Any) -> Any:
    """Return a parameter of an equation as something that can be compared."""
    if isinstance(value, jexc.ClosedJaxpr):
        return structure(value.jaxpr, value.consts)
    if isinstance(value, jexc.Jaxpr):
        return structure(value)
    if isinstance(value, tuple | list):
        return tuple(_plain(key, item) for item in value)
    if key == "name" and isinstance(value, str):
        return value if not value.startswith((ACTIVATION, SLICE)) else ""
    if isinstance(value, np.ndarray):
        return _constant(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _constant(value: Any) -> Any:
    """Return a captured constant as something that can be compared."""
    if isinstance(value, np.ndarray | np.generic) and value.size <= 4096:
        return (value.dtype.str, value.shape, value.tobytes())
    return id(value)


def _is_literal(v: Any) -> bool:
    return isinstance(v, jexc.Literal)
