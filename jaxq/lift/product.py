"""`Product`: which axes of an activation a product sums over, and with what."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxq.lift.leaf import is_leaf
from jaxq.lift.use import Use
from jaxq.lift.weight import Weight
from jaxq.ops import Patches

RESHAPED = "its kernel is put together from other axes on the way to the convolution"
BATCH_GROUPS = "its convolution has batch groups ({count})"


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
        patches: how the rows of a convolution come of its activation, or None.
    """

    use: Use
    index: tuple[int, ...]
    batch: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    groups: int = 0
    whole: str | None = None
    patches: Patches | None = None


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
        return _convolution(eqn, leaf, x)
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
    whole = None
    if seen != length:
        whole = f"a product sums over {seen} of its {length} contracted elements"
    elif leaf.flipped & set(contracted):
        whole = "it is reversed on the way to its product"
    return Product(
        Use(leaf.path, "dot_general", contracted, stacked, shape),
        leaf.index,
        tuple(xb[i] for i in places),
        tuple(xc[i] for i in order),
        whole=whole,
    )


def _convolution(eqn: Any, leaf: Weight, x: jax.Array) -> Product:
    """Describe a convolution by its patches, or say why it has none to observe."""
    out, *inner = eqn.params["dimension_numbers"].rhs_spec
    groups, batch_groups = (
        eqn.params[f"{kind}_group_count"] for kind in ("feature", "batch")
    )
    use = Use(
        leaf.path,
        eqn.primitive.name,
        leaf.original(inner),
        leaf.stacked,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        window=leaf.original(inner[1:]),
        groups=groups,
    )
    if batch_groups > 1:
        return Product(use, leaf.index, whole=BATCH_GROUPS.format(count=batch_groups))
    found = [_own_axis(leaf, axis) for axis in inner]
    own = [axis for axis in found if axis is not None]
    if own != found or (groups > 1 and _own_axis(leaf, out) is None):
        return Product(use, leaf.index, whole=RESHAPED)
    order = sorted(range(len(inner)), key=own.__getitem__)
    flipped = [axis in leaf.flipped for axis in own]
    if flipped[0] or (groups > 1 and leaf.flipped & set(leaf.original([out]))):
        return Product(use, leaf.index, whole="its kernel's channels are reversed")
    patches = Patches.of(eqn.params, leaf.value.shape, order, flipped[1:])
    return Product(use, leaf.index, patches=patches)


def _own_axis(leaf: Weight, axis: int) -> int | None:
    """Return which axis of its parameter a view's axis is; -1 for a new one of one.

    None when it is several of them, or a part.
    """
    length, labels = leaf.value.shape[axis], leaf.axes[axis]
    if length == 1 and not labels:
        return -1
    alone = sum(bool(labels & others) for others in leaf.axes) == 1
    if len(labels) != 1 or not alone or leaf.full[min(labels)] != length:
        return None
    return min(labels)


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
