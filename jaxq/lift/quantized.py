"""`quantized`: any JAX function, `QTensor` leaves welcome."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq.lift.replay import Replay
from jaxq.lift.trace import Call, Trace, trace
from jaxq.qtensor import QTensor


def quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
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

    Example:
        >>> import jax, jaxq
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> q = jaxq.quantize(w, jaxq.QuantSpec("int8"))
        >>> jaxq.quantized(lambda w, x: x @ w)(q, jax.numpy.ones((2, 64))).shape
        (2, 8)
    """
    traces: dict[Any, tuple[Trace, Callable[..., Any]]] = {}

    @functools.wraps(fn, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        call = Call.of(args, kwargs)
        key = call.cache_key()
        known = traces.get(key) if key is not None else None
        if known is None:
            traced = trace(fn, call)
            known = traced, jax.jit(functools.partial(_replay, traced))
            if key is not None and traced.is_reusable:
                traces[key] = known
        traced, compiled = known
        named = named_arrays(call)
        inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(named))
        outs = _replay(traced, named) if inside else compiled(named)
        return jax.tree.unflatten(traced.out_tree, outs)

    return run


def named_arrays(call: Call) -> list[Any]:
    """Return the array leaves, quantized ones with their path as name."""
    return [
        dataclasses.replace(call.leaves[i], name=call.paths[i])
        if isinstance(call.leaves[i], QTensor)
        else call.leaves[i]
        for i in call.dynamic
    ]


def _replay(traced: Trace, arrays: Sequence[Any]) -> list[Any]:
    """Replay on the given leaves; a leaf that is returned as it is gets dequantized."""
    replay = Replay(traced.jaxpr.jaxpr.debug_info)
    return replay.arrays(replay.run(traced.jaxpr, arrays), "output")
