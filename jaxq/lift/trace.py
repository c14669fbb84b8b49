"""From a function call to a jaxpr over its array arguments."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jexc
from jax.sharding import AxisType

from jaxq.qtensor import QTensor, is_qtensor

ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, QTensor)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, taken apart.

    Attributes:
        leaves: every leaf of ``(args, kwargs)``; a `QTensor` is one leaf.
        paths: the leaves' paths below their argument, joined with "/".
        arguments: which positional argument a leaf belongs to (-1: a keyword).
        dynamic: the indices of array leaves; the others are constants.
        treedef: to put them together again.
    """

    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    arguments: tuple[int, ...]
    dynamic: tuple[int, ...]
    treedef: Any

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Call":
        """Flatten the arguments."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            (tuple(args), dict(kwargs)), is_leaf=is_qtensor
        )
        leaves = tuple(leaf for _, leaf in flat)
        dynamic = tuple(i for i, x in enumerate(leaves) if isinstance(x, ARRAYS))
        return cls(
            leaves,
            tuple(path_string(path[2:]) for path, _ in flat),
            tuple(path[1].idx if path[0].idx == 0 else -1 for path, _ in flat),
            dynamic,
            treedef,
        )

    @property
    def arrays(self) -> list[Any]:
        """The array leaves, in order."""
        return [self.leaves[i] for i in self.dynamic]

    def avals(self) -> list[Any]:
        """Return what each array leaf looks like to the traced function."""
        return [abstract(x) for x in self.arrays]

    def cache_key(self) -> Any:
        """Return a key under which a trace of this call may be reused, or None."""
        static = tuple(x for x in self.leaves if not isinstance(x, ARRAYS))
        shapes = tuple(map(jax.typeof, self.avals()))
        key = (self.treedef, self.dynamic, shapes, static, _types(static))
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def rebuild(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` with the array leaves replaced."""
        leaves = list(self.leaves)
        for i, array in zip(self.dynamic, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A function as a jaxpr over the array leaves of one call.

    Attributes:
        jaxpr: the traced computation.
        out_tree: the structure of the function's result.
    """

    jaxpr: jexc.ClosedJaxpr
    out_tree: Any

    @property
    def is_reusable(self) -> bool:
        """Whether nothing of an enclosing trace is captured in it."""
        return not any(isinstance(c, jax.core.Tracer) for c in self.jaxpr.consts)


def trace(fn: Callable[..., Any], call: Call) -> Trace:
    """Trace ``fn`` once, on the logical shapes of its arguments."""

    def flat(*arrays: jax.Array) -> Any:
        args, kwargs = call.rebuild(arrays)
        return fn(*args, **kwargs)

    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*call.avals())
    return Trace(jaxpr, jax.tree.structure(out))


def abstract(x: Any) -> Any:
    """Return what a traced function sees of an array leaf."""
    if not isinstance(x, QTensor):
        return x
    if AxisType.Manual in jax.typeof(x.codes).sharding.mesh.axis_types:
        # inside a shard_map, where a type says over which mesh axes values differ
        return jax.eval_shape(QTensor.dequantize, x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def path_string(path: Sequence[Any]) -> str:
    """Join a key path with "/": ``params/Dense_0/kernel``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _types(values: Sequence[Any]) -> tuple[type, ...]:
    """Return the types: ``1``, ``1.0`` and ``True`` are equal but trace differently."""
    return tuple(type(v) for v in values)
