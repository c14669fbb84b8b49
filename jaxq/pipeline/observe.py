"""`calibrate`: run a function, and observe the activation of each product."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxq.lift import tapped
from jaxq.observers import Observer
from jaxq.pipeline.checks import is_constant


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Sequence[Any]],
    observers: Mapping[str, Observer],
) -> dict[str, dict[str, Any]]:
    """Run ``fn`` on every batch and observe the activation of each product.

    Args:
        fn: called as ``fn(params, *batch)``.
        params: its parameters.
        batches: tuples of its other arguments. Python numbers, strings and None among
            them are constants.
        observers: by name; see `jaxq.observers`. Of a convolution they see the
            activation as it is, not its patches (`jaxq.ops.Patches`).

    Returns:
        For each parameter's path the state of every observer. A parameter used several
        times is observed over all uses; inside a scan states are stacked over layers.

    Raises:
        ValueError: when there is no batch.
    """

    def tap(path: str, x: jax.Array) -> dict[str, Any]:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return {n: o.update(o.init(like), x) for n, o in observers.items()}

    def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {name: o.merge(a[name], b[name]) for name, o in observers.items()}

    def steps(*constants: int) -> Callable[..., dict[str, list[Any]]]:
        return jax.jit(tapped(fn, tap), static_argnums=constants)

    compiled = functools.cache(steps)
    total: dict[str, dict[str, Any]] = {}
    for batch in batches:
        constants = (i for i, x in enumerate(batch, 1) if is_constant(x))
        for path, uses in compiled(*constants)(params, *batch).items():
            seen = functools.reduce(merge, uses)
            total[path] = merge(total[path], seen) if path in total else seen
    if not total:
        raise ValueError(
            "calibration saw no activation: the batches are empty, or the function "
            "multiplies with none of its parameters"
        )
    return total
