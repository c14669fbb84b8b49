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
from jaxq.lift.product_rules import PRODUCT_RULES
from jaxq.lift.replay import Replay, is_outer
from jaxq.lift.trace import Call, trace
from jaxq.lift.use import Use
from jaxq.lift.weight import Weight

ACTIVATION = "jaxq/activation/"
SLICE = "jaxq/slice/"
UNSEEN_PATCHES = "the patches of a convolution are not observed"


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of the flat program.

    Attributes:
        use: the parameter, the operation and the parameter's axes.
        index: which slice of the parameter it takes, one number per enclosing scan.
        batch: the activation's axes that go with stacked weights (experts), in the
            order of the weight's stacked axes.
        summed: the activation's contracted axes, in the order of the weight's.
        groups: the number of experts of a ``ragged_dot``, else 0.
        whole: why the activation does not cover the whole contraction, or None.
    """

    use: Use
    index: tuple[int, ...]
    batch: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    groups: int = 0
    whole: str | None = None


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
        leaves = [i for i, v in enumerate(values) if is_leaf(v)]
        side = leaves[-1] if leaves[-1] < 2 else leaves[0]
        other = 1 - side
        leaf, x = values[side], values[other]
        if eqn.primitive.name.startswith("ragged") and side != 1:
            return values
        if is_leaf(x):
            x = self.arrays([x], eqn.primitive.name)[0]
        out = list(values)
        out[other] = checkpoint_name(x, f"{ACTIVATION}{len(self.products)}")
        self.products.append(_product(eqn, leaf, side, x))
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


def _product(eqn: Any, leaf: Weight, side: int, x: jax.Array) -> Product:
    """Describe a product: which axes of its activation are what."""
    name = eqn.primitive.name
    if name.startswith("ragged"):
        return _ragged_product(eqn, leaf, x)
    if name == "conv_general_dilated":
        summed = tuple(sorted(eqn.params["dimension_numbers"].rhs_spec[1:]))
        use = Use(leaf.path, name, leaf.original(summed), leaf.stacked)
        return Product(use, leaf.index, whole=UNSEEN_PATCHES)
    contract, batch = eqn.params["dimension_numbers"]
    wc, xc = contract[side], contract[1 - side]
    wb, xb = batch[side], batch[1 - side]
    order = sorted(range(len(wc)), key=lambda i: (min(leaf.axes[wc[i]] or {0}), wc[i]))
    places = sorted(range(len(wb)), key=lambda i: (min(leaf.axes[wb[i]] or {0}), wb[i]))
    contracted = leaf.original(wc)
    stacked = tuple(sorted({*leaf.stacked, *leaf.original(wb)}))
    length = 1
    for axis in contracted:
        length *= leaf.full[axis]
    seen = 1
    for axis in xc:
        seen *= x.shape[axis]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return Product(
        Use(leaf.path, "dot_general", contracted, stacked, shape),
        leaf.index,
        tuple(xb[i] for i in places),
        tuple(xc[i] for i in order),
        whole=None
        if seen == length
        else f"a product sums over {seen} of its {length} contracted elements",
    )


def _ragged_product(eqn: Any, leaf: Weight, x: jax.Array) -> Product:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    usual = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    usual = usual and tuple(numbers.rhs_group_dimensions) == (0,)
    usual = usual and tuple(numbers.lhs_ragged_dimensions) == (0,)
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    stacked = leaf.original((*batch, *numbers.rhs_group_dimensions))
    stacked = tuple(sorted({*leaf.stacked, *stacked}))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return Product(
        Use(leaf.path, "ragged_dot", leaf.original(contract), stacked, shape),
        leaf.index,
        (),
        (1,),
        groups=leaf.value.shape[0],
        whole=None if usual else f"dimension numbers {numbers}",
    )


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
