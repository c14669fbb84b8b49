"""Primitives that only rearrange a parameter: one row each, for both kinds of leaf."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import views
from jaxq.layer import Layer, layer_of
from jaxq.lift.weight import Labels, reshaped
from jaxq.ops import gather
from jaxq.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class ViewRule:
    """How a primitive acts on a leaf.

    Attributes:
        quantized: the view of a `QTensor`; raises `ViewError` when there is none.
        labels: the axis labels of a `Weight`'s view.
    """

    quantized: Callable[[QTensor, Any, list[Any]], QTensor]
    labels: Callable[[Labels, Any, tuple[int, ...]], Labels]


def _same_labels(labels: Labels, eqn: Any, shape: tuple[int, ...]) -> Labels:
    return labels


def _reshape(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    if eqn.params.get("dimensions") is not None:
        raise views.ViewError("reshapes with a permutation")
    return views.reshape(q, eqn.params["new_sizes"])


def _reshape_labels(labels: Labels, eqn: Any, shape: tuple[int, ...]) -> Labels:
    return reshaped(labels, shape, eqn.outvars[0].aval.shape)


def _broadcast(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    added = [n for i, n in enumerate(shape) if i not in kept]
    if any(n != 1 for n in added) or tuple(shape[i] for i in kept) != q.shape:
        raise views.ViewError(f"broadcast to {tuple(shape)}")
    return views.reshape(q, shape)


def _broadcast_labels(labels: Labels, eqn: Any, shape: tuple[int, ...]) -> Labels:
    kept = eqn.params["broadcast_dimensions"]
    out = [frozenset()] * len(eqn.params["shape"])
    for source, target in enumerate(kept):
        out[target] = labels[source]
    return tuple(out)


def _squeeze(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    return views.reshape(q, eqn.outvars[0].aval.shape)


def _squeeze_labels(labels: Labels, eqn: Any, shape: tuple[int, ...]) -> Labels:
    gone = eqn.params["dimensions"]
    return tuple(label for i, label in enumerate(labels) if i not in gone)


def _transpose(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    return views.transpose(q, eqn.params["permutation"])


def _transpose_labels(labels: Labels, eqn: Any, shape: tuple[int, ...]) -> Labels:
    return tuple(labels[i] for i in eqn.params["permutation"])


def _slice(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"]
    if strides is not None and any(s != 1 for s in strides):
        raise views.ViewError("slices with a stride")
    for axis, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        q = views.slice_axis(q, axis, start, limit - start)
    return q


def _dynamic_slice(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if size != q.shape[axis]:
            q = views.index_axis(q, axis, _slicer(rest[axis], size))
    return q


def _slicer(start: Any, size: int) -> Callable[[jax.Array, int], jax.Array]:
    return lambda a, axis: lax.dynamic_slice_in_dim(a, start, size, axis)


def _rev(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    for axis in eqn.params["dimensions"]:
        q = views.index_axis(q, axis, lambda a, i: lax.rev(a, (i,)))
    return q


def _gather(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    params = dict(eqn.params)
    numbers, sizes = params.pop("dimension_numbers"), params.pop("slice_sizes")
    fill = params.pop("fill_value", None)
    if fill is not None and not (fill == 0 or fill != fill):
        raise views.ViewError(f"fills missing rows with {fill}")

    def bind(a: jax.Array, indices: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        # a missing row is NaN (or 0) because its scale is, whatever its codes
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        value = jnp.iinfo(a.dtype).max if whole and fill is not None else fill
        return eqn.primitive.bind(
            a,
            indices,
            dimension_numbers=numbers,
            slice_sizes=sizes,
            fill_value=value,
            **params,
        )

    return gather(q, rest[0], numbers, sizes, bind)


def _gather_labels(labels: Labels, eqn: Any, shape: tuple[int, ...]) -> Labels:
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [label for i, label in enumerate(labels) if i not in gone]
    out = [frozenset()] * len(eqn.outvars[0].aval.shape)
    for place, label in zip(numbers.offset_dims, kept, strict=True):
        out[place] = label
    return tuple(out)


def _cast(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    return views.astype(q, eqn.params["new_dtype"])


def _identity(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor:
    return q


VIEW_RULES: dict[str, ViewRule] = {
    "convert_element_type": ViewRule(_cast, _same_labels),
    "transpose": ViewRule(_transpose, _transpose_labels),
    "reshape": ViewRule(_reshape, _reshape_labels),
    "broadcast_in_dim": ViewRule(_broadcast, _broadcast_labels),
    "squeeze": ViewRule(_squeeze, _squeeze_labels),
    "slice": ViewRule(_slice, _same_labels),
    "dynamic_slice": ViewRule(_dynamic_slice, _same_labels),
    "rev": ViewRule(_rev, _same_labels),
    "gather": ViewRule(_gather, _gather_labels),
    "copy": ViewRule(_identity, _same_labels),
    "copy_p": ViewRule(_identity, _same_labels),
    "reduce_precision": ViewRule(_identity, _same_labels),
    "sharding_constraint": ViewRule(_identity, _same_labels),
}


def _sliced_layer(q: QTensor | Layer, eqn: Any, rest: list[Any]) -> Layer | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    sizes = tuple(b - a for a, b in zip(starts, limits, strict=True))
    return _one_of(q, starts[0], sizes)


def _dynamic_layer(q: QTensor | Layer, eqn: Any, rest: list[Any]) -> Layer | None:
    return _one_of(q, rest[0], eqn.params["slice_sizes"])


def _one_of(q: QTensor | Layer, index: Any, sizes: Sequence[int]) -> Layer | None:
    """Return one matrix of a stack that a kernel takes whole, or None."""
    if isinstance(q, Layer) or tuple(sizes) != (1, *q.shape[1:]):
        return None
    return layer_of(q, index, kept=True)


def _squeezed_layer(q: QTensor | Layer, eqn: Any, rest: list[Any]) -> Layer | None:
    if isinstance(q, Layer) and q.kept and tuple(eqn.params["dimensions"]) == (0,):
        return dataclasses.replace(q, kept=False)
    return None


def _cast_layer(q: QTensor | Layer, eqn: Any, rest: list[Any]) -> Layer | None:
    dtype = eqn.params["new_dtype"]
    if isinstance(q, Layer) and jnp.issubdtype(dtype, jnp.floating):
        return dataclasses.replace(q, stack=views.astype(q.stack, dtype))
    return None


# What leaves one matrix of a stack a `Layer`; None where the index must be applied.
LAYER_RULES: dict[str, Callable[[QTensor | Layer, Any, list[Any]], Layer | None]] = {
    "slice": _sliced_layer,
    "dynamic_slice": _dynamic_layer,
    "squeeze": _squeezed_layer,
    "convert_element_type": _cast_layer,
}


def split(q: QTensor, sizes: tuple[int, ...], axis: int) -> list[QTensor]:
    """Split along an axis: the multiple results of the ``split`` primitive."""
    length, start, out = q.shape[axis], 0, []
    for size in sizes:
        out.append(views.slice_axis(q, axis, start, size, length))
        start += size
    return out
