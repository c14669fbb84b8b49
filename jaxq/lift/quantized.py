"""`quantized`: any JAX function, `QTensor` leaves welcome."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq.lift.replay import Replay
from jaxq.lift.trace import ARRAYS, Call, Trace, trace
from jaxq.qtensor import QTensor
from pallas_kernels.target import Target


def quantized(
    fn: Callable[..., Any], *, target: Target | None = None
) -> Callable[..., Any]:
    """Return ``fn`` as a function that also accepts `QTensor` leaves anywhere.

    ``quantized(fn)(q) = fn(dequantize(q))`` up to the rounding of the arithmetic. The
    function is traced once per structure of its arguments and its jaxpr replayed with
    the quantized leaves in it: products run on packed codes, what has no fused rule
    dequantizes first (see `jaxq.explain`). ``fn`` itself is not changed.

    Called with concrete arrays it compiles, like `jax.jit`, once per structure, and
    keeps that for the life of the returned function: keep the function. Under `jit`,
    `grad`, `vmap`, `scan` or `shard_map` it is part of the enclosing trace. Python
    numbers, strings and None among the arguments are constants.

    Args:
        fn: any function that `jax.jit` could trace.
        target: the chip to choose kernels for; by default that of the mesh in context,
            or else the one this runs on.

    Example:
        >>> import jax, jaxq
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> q = jaxq.quantize(w, jaxq.QuantSpec("int8"))
        >>> jaxq.quantized(lambda w, x: x @ w)(q, jax.numpy.ones((2, 64))).shape
        (2, 8)
    """
    traces: dict[Any, Trace] = {}

    def replayed(args: Any, kwargs: Any) -> Any:
        call = Call.of(args, kwargs)
        key = call.cache_key()
        traced = traces.get(key) if key is not None else None
        if traced is None:
            traced = trace(fn, call)
            if key is not None and traced.is_reusable:
                traces[key] = traced
        outs = _replay(traced, named_arrays(call), target)
        return jax.tree.unflatten(traced.out_tree, outs)

    def from_arrays(arrays: list[Any], constants: Constants) -> Any:
        return replayed(*constants.join(arrays))

    compiled = jax.jit(from_arrays, static_argnums=1)

    @functools.wraps(fn, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        arrays, constants = Constants.split(args, kwargs)
        if any(isinstance(x, jax.core.Tracer) for x in arrays):
            return replayed(args, kwargs)
        if constants.is_hashable:
            return compiled(arrays, constants)
        return jax.jit(lambda arrays: from_arrays(arrays, constants))(arrays)

    return run


@dataclasses.dataclass(frozen=True)
class Constants:
    """All of a call's arguments but the arrays; what a compiled call is known by.

    Attributes:
        treedef: the structure of ``(args, kwargs)``, with the arrays of each `QTensor`
            as leaves: the path that every call takes must be fast.
        values: the leaves, None in the place of an array.
        types: of the leaves: ``1``, ``1.0`` and ``True`` are equal.
    """

    treedef: Any
    values: tuple[Any, ...]
    types: tuple[type | None, ...]

    @classmethod
    def split(cls, args: Any, kwargs: Any) -> "tuple[list[Any], Constants]":
        """Return the arrays and the rest."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if isinstance(x, ARRAYS)]
        if len(arrays) == len(leaves):
            empty = (None,) * len(leaves)
            return arrays, cls(treedef, empty, empty)
        kept = [None if isinstance(x, ARRAYS) else x for x in leaves]
        types = (None if isinstance(x, ARRAYS) else type(x) for x in leaves)
        return arrays, cls(treedef, tuple(kept), tuple(types))

    @property
    def is_hashable(self) -> bool:
        """Whether a compiled call can be found again."""
        try:
            hash(self)
        except TypeError:
            return False
        return True

    def join(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)``."""
        fresh = iter(arrays)
        pairs = zip(self.values, self.types, strict=True)
        leaves = [next(fresh) if kind is None else x for x, kind in pairs]
        return jax.tree.unflatten(self.treedef, leaves)


def named_arrays(call: Call) -> list[Any]:
    """Return the array leaves, quantized ones with their path as name."""
    return [
        dataclasses.replace(call.leaves[i], name=call.paths[i])
        if isinstance(call.leaves[i], QTensor)
        else call.leaves[i]
        for i in call.dynamic
    ]


def _replay(traced: Trace, arrays: Sequence[Any], target: Target | None) -> list[Any]:
    """Replay on the given leaves; a leaf that is returned as it is gets dequantized."""
    replay = Replay(traced.jaxpr.jaxpr.debug_info, target=target)
    return replay.arrays(replay.run(traced.jaxpr, arrays), "output")
