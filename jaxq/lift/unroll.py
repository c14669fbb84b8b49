"""Flatten a function: one straight list of equations, its products marked.

Calls, checkpoints and scans over stacked weights are opened up, so that the way from
one product to the next can be run piece by piece (see `jaxq.lift.program`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jexc

from jaxq.lift.control_rules import call, scan_arity
from jaxq.lift.leaf import is_leaf
from jaxq.lift.product import Product, describe, weight_side
from jaxq.lift.product_rules import PRODUCT_RULES
from jaxq.lift.replay import Replay, is_outer
from jaxq.lift.trace import Call, trace
from jaxq.lift.use import Use
from jaxq.lift.weight import Weight

ACTIVATION = "jaxq/activation/"
SLICE = "jaxq/slice/"


@dataclasses.dataclass(frozen=True)
class Flat:
    """A flat program.

    Attributes:
        jaxpr: the equations; products' activations pass a ``name`` equation called
            `ACTIVATION` and the product's number, slices of parameters one called
            `SLICE` and their number.
        call: the arguments that it was made for.
        out_tree: the structure of the function's result.
        products: by number.
        slices: (path, index) of each slice of a scanned parameter, by number.
        steps: how many trailing inputs there are, the numbers 0, 1, ... of scans'
            steps: as inputs, equal steps are equal equations.
        uses: every meeting of a parameter and an operation.
    """

    jaxpr: jexc.ClosedJaxpr
    call: Call
    out_tree: Any
    products: tuple[Product, ...]
    slices: tuple[tuple[str, tuple[int, ...]], ...]
    steps: int
    uses: tuple[Use, ...]


def flatten(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Flat:
    """Trace ``fn(params, *example)`` into a flat program."""
    called = Call.of(args, kwargs)
    traced = trace(fn, called)
    replay = Unroll(traced.jaxpr.jaxpr.debug_info)

    def run(arrays: list[jax.Array], steps: list[jax.Array]) -> list[jax.Array]:
        nonlocal replay
        replay = Unroll(traced.jaxpr.jaxpr.debug_info, steps=steps)
        leaves = [
            _watch(a, called.paths[i], called.arguments[i])
            for a, i in zip(arrays, called.dynamic, strict=True)
        ]
        return replay.arrays(replay.run(traced.jaxpr, leaves), "output")

    avals, number = called.avals(), jax.ShapeDtypeStruct((), jnp.int32)
    jax.eval_shape(run, avals, [])
    count = replay.longest
    jaxpr = jax.make_jaxpr(run)(avals, [number] * count)
    return Flat(
        jaxpr,
        called,
        traced.out_tree,
        tuple(replay.products),
        tuple(replay.slices),
        count,
        tuple(dict.fromkeys(replay.uses)),
    )


def _watch(x: jax.Array, path: str, argument: int) -> Any:
    watched = argument == 0 and jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    return Weight.of(x, path) if watched else x


@dataclasses.dataclass
class Unroll(Replay):
    """A replay that opens up control flow and marks products.

    Attributes:
        products: those met so far.
        slices: slices of scanned parameters taken so far.
        steps: the numbers 0, 1, ... as values of the program, as far as they reach.
        longest: how many of them are needed.
        depth: how deep inside control flow that stays closed.
    """

    products: list[Product] = dataclasses.field(default_factory=list)
    slices: list[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    steps: list[jax.Array] = dataclasses.field(default_factory=list)
    longest: int = 0
    depth: int = 0

    def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluate one equation that meets a leaf."""
        name = eqn.primitive.name
        if name in ("checkpoint", "remat", "remat2"):
            return call(self, eqn, values)
        if name == "scan" and _scans_weights(eqn, values):
            return self._scan(eqn, values)
        if name in PRODUCT_RULES and not is_outer(eqn) and not self.depth:
            values = self._marked(eqn, values)
        return super()._equation(eqn, values)

    def inside(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``fn`` as the body of control flow that stays closed."""
        framed = super().inside(fn)

        def closed(*args: Any) -> Any:
            self.depth += 1
            try:
                return framed(*args)
            finally:
                self.depth -= 1

        return closed

    def _marked(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Mark the activation of a product, and record it."""
        side = weight_side(eqn, values)
        if side is None:
            return values
        leaf, out = values[side], list(values)
        x = self.arrays([values[1 - side]], eqn.primitive.name)[0]
        out[1 - side] = checkpoint_name(x, f"{ACTIVATION}{len(self.products)}")
        self.products.append(describe(eqn, leaf, side, x))
        return out

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Run the body step by step, each on its own slices."""
        body = eqn.params["jaxpr"]
        consts, carry, stacks = scan_arity(eqn, values)
        length = eqn.params["length"]
        self.longest = max(self.longest, length)
        order = reversed(range(length)) if eqn.params["reverse"] else range(length)
        rows: dict[int, list[Any]] = {}
        for step in order:
            slices = [self._slice(x, step) for x in stacks]
            outs = self.run(body, [*consts, *carry, *slices])
            carry = outs[: len(carry)]
            rows[step] = self.arrays(outs[len(carry) :], "scan output")
        columns = zip(*(rows[i] for i in range(length)), strict=True)
        return [*carry, *(jnp.stack(column) for column in columns)]

    def _slice(self, x: Any, step: int) -> Any:
        """Return one step's slice of a scanned value."""
        number = self.steps[step] if step < len(self.steps) else jnp.int32(step)
        if not is_leaf(x):
            return lax.dynamic_index_in_dim(x, number, keepdims=False)
        index = (*x.index, step)
        value = lax.dynamic_index_in_dim(x.value, number, keepdims=False)
        if _is_whole(x):
            value = checkpoint_name(value, f"{SLICE}{len(self.slices)}")
            self.slices.append((x.path, index))
        return dataclasses.replace(x, value=value, index=index)


def _scans_weights(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether a scan's steps have weights of their own: matrices, or more."""
    _, _, stacks = scan_arity(eqn, values)
    return any(is_leaf(x) and x.value.ndim > 2 for x in stacks)


def _is_whole(x: Weight) -> bool:
    """Whether a scanned leaf is its parameter as it is, but for casts and slices."""
    rank = len(x.full)
    labels = tuple(frozenset([i]) for i in range(rank))
    here = x.full[rank - x.value.ndim :]
    return (
        x.labels[-x.value.ndim :] == labels[-x.value.ndim :] and here == x.value.shape
    )
