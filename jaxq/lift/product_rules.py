"""Products of an activation and a leaf: which operation, and what it sums over."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxq import ops
from jaxq.layer import Layer
from jaxq.lift.leaf import is_leaf
from jaxq.qtensor import QTensor
from jaxq.views import ViewError

if TYPE_CHECKING:
    from jaxq.lift.replay import Replay


def dot_general(replay: "Replay", eqn: Any, values: list[Any]) -> jax.Array:
    """Multiply with the leaf on either side."""
    side = 0 if is_leaf(values[0]) else 1
    leaf, x = values[side], values[1 - side]
    contract, batch = eqn.params["dimension_numbers"]
    if isinstance(leaf, QTensor | Layer):
        y, choice = ops.dot_general(
            values[0],
            values[1],
            eqn.params["dimension_numbers"],
            eqn.params["precision"],
            eqn.outvars[0].aval.dtype,
            replay.target,
        )
        replay.product(leaf, "dot_general", contract[side], x, choice)
        return y
    replay.product(leaf, "dot_general", contract[side], x, batch=batch[side])
    return replay.float_equation(eqn, values)


def ragged_dot(replay: "Replay", eqn: Any, values: list[Any]) -> jax.Array:
    """Multiply every token with its expert's weight."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    usual = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    usual = usual and groups == (0,) and tuple(numbers.lhs_ragged_dimensions) == (0,)
    x, leaf = values[:2]
    if not isinstance(leaf, QTensor):
        if not is_leaf(leaf):
            return replay.float_equation(eqn, values)
        replay.product(leaf, "ragged_dot", contract, x, batch=(*batch, *groups))
        return replay.float_equation(eqn, values)
    try:
        if not usual:
            raise ViewError(f"dimension numbers {numbers}")
        y, choice = ops.ragged_dot(
            x, leaf, values[2], eqn.params["precision"], eqn.outvars[0].aval.dtype
        )
    except ViewError as reason:
        why = str(reason)
        if leaf.activation is not None:
            why += "; the activation stays float"
        choice = ops.Choice("dequantize", (("xla.tiled_ragged_dot", why),))
        y = replay.float_equation(eqn, [x, leaf.dequantize(), *values[2:]])
    replay.product(leaf, "ragged_dot", contract, x, choice)
    return y


def conv_general_dilated(replay: "Replay", eqn: Any, values: list[Any]) -> jax.Array:
    """Convolve with a quantized kernel (the right operand)."""
    x, leaf = values
    if not is_leaf(leaf):
        return replay.float_equation(eqn, values)
    _, *summed = eqn.params["dimension_numbers"].rhs_spec
    contracting = tuple(sorted(summed))
    if isinstance(leaf, QTensor):
        y, choice = ops.conv_general_dilated(x, leaf, **eqn.params)
        replay.product(leaf, "conv_general_dilated", contracting, x, choice)
        return y
    more = (summed[1:], eqn.params["feature_group_count"])
    replay.product(leaf, "conv_general_dilated", contracting, x, convolution=more)
    return replay.float_equation(eqn, values)


PRODUCT_RULES: dict[str, Callable[..., jax.Array]] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "ragged_dot": ragged_dot,
    "conv_general_dilated": conv_general_dilated,
}
