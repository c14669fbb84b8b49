"""`Product`: which axes of an activation a product sums over, and with what."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxq.lift.leaf import is_leaf
from jaxq.lift.use import Use
from jaxq.lift.weight import Weight

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


def weight_side(eqn: Any, values: Sequence[Any]) -> int | None:
    """Return which operand of a product is the weight; None when it is no such product.

    Of two leaves, the second is the weight and the first an activation.
    """
    leaves = [i for i, v in enumerate(values[:2]) if is_leaf(v)]
    side = leaves[-1] if leaves else None
    left_only = eqn.primitive.name != "dot_general" and side == 0
    return None if left_only else side


def describe(eqn: Any, leaf: Weight, side: int, x: jax.Array) -> Product:
    """Describe a product: which axes of its activation are what.

    Args:
        eqn: the product's equation.
        leaf: its weight.
        side: which operand the weight is.
        x: the other one.
    """
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
    length = math.prod(leaf.full[axis] for axis in contracted)
    seen = math.prod(x.shape[axis] for axis in xc)
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
