"""Taps: run the float function and collect something of each product's activation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift.product import Product, describe, weight_side
from jaxq.lift.product_rules import PRODUCT_RULES
from jaxq.lift.replay import Replay, Tap, is_outer
from jaxq.lift.trace import Call, trace
from jaxq.lift.weight import Weight
from jaxq.qtensor import QTensor


def tapped(fn: Callable[..., Any], tap: Tap) -> Callable[..., dict[str, list[Any]]]:
    """Return a function of ``fn``'s arguments that collects ``tap(path, activation)``.

    Args:
        fn: any function that `jax.jit` could trace; its first argument holds the
            parameters, float or quantized.
        tap: a pure function from (parameter path, activation) to a pytree of arrays, or
            None to collect nothing there.

    Returns:
        A pure function returning, by parameter path, one entry per product; of a
        product inside a scan the entry is stacked over the steps. Products inside
        ``while`` and ``cond`` are not tapped: whether they run is not known.

    Example:
        >>> import jax.numpy as jnp
        >>> largest = tapped(lambda p, x: x @ p["w"], lambda path, x: jnp.max(x))
        >>> found = largest({"w": jnp.ones((2, 3))}, jnp.ones((1, 2)))
        >>> {path: float(values[0]) for path, values in found.items()}
        {'w': 1.0}
    """

    def run(*args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        call = Call.of(args, kwargs)
        traced = trace(fn, call)
        replay = Replay(traced.jaxpr.jaxpr.debug_info, tap=tap)
        leaves = [_watch(call, i) for i in call.dynamic]
        replay.run(traced.jaxpr, leaves)
        return replay.taps

    return run


def product_tapped(
    fn: Callable[..., Any], tap: Callable[[Product, jax.Array, Any], Any]
) -> Callable[..., dict[str, list[Any]]]:
    """Return what `tapped` does, with ``tap(product, activation, sizes)``.

    The product says which axes of the activation are summed over; ``sizes`` are the
    rows of each expert of a ``ragged_dot``, else None.
    """

    def run(*args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        call = Call.of(args, kwargs)
        traced = trace(fn, call)
        replay = _Watching(traced.jaxpr.jaxpr.debug_info, look=tap)
        replay.run(traced.jaxpr, [_watch(call, i) for i in call.dynamic])
        return replay.taps

    return run


@dataclasses.dataclass
class _Watching(Replay):
    """A replay that looks at products as equations.

    Attributes:
        look: what to collect at a product.
    """

    look: Callable[[Product, jax.Array, Any], Any] | None = None

    def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluate one equation that meets a leaf."""
        if eqn.primitive.name in PRODUCT_RULES and not is_outer(eqn):
            side = weight_side(eqn, values)
            if side is not None and self.look is not None:
                x = self.arrays([values[1 - side]], eqn.primitive.name)[0]
                product = describe(eqn, values[side], side, x)
                sizes = values[2] if product.groups else None
                found = self.look(product, x, sizes)
                self.taps.setdefault(product.use.path, []).append(found)
        return super()._equation(eqn, values)


def _watch(call: Call, index: int) -> Any:
    """Wrap a parameter so that its products are noticed."""
    x, path = call.leaves[index], call.paths[index]
    if call.arguments[index] != 0:
        return x
    if isinstance(x, QTensor):
        return dataclasses.replace(x, name=path)
    watched = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    return Weight.of(x, path) if watched else x
