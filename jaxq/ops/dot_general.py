"""`jax.lax.dot_general` with a `QTensor` on either side."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq import views
from jaxq.layer import Layer
from jaxq.ops.activation import (
    picked_input,
    quantized_input,
    scaled_input,
    take_columns,
    with_static_scales,
)
from jaxq.ops.dispatch import multiply
from jaxq.ops.problem import Choice, Problem
from jaxq.qtensor import QTensor
from pallas_kernels.target import Target

Axes = tuple[int, ...]
Matmul = Callable[..., tuple[jax.Array, Choice]]
# what a weight asks of the activation, whichever kernel multiplies
BESIDE = ("input_index", "input_scale", "activation_scale", "activation_zero")
DimensionNumbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]


def dot_general(
    lhs: "jax.Array | QTensor | Layer",
    rhs: "jax.Array | QTensor | Layer",
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    target: Target | None = None,
) -> tuple[jax.Array, Choice]:
    """Return ``lax.dot_general`` of an activation and a quantized weight.

    The operands are brought to ``x[M, K] @ w[K, N]`` by views (no codes are moved
    unless the weight is transposed) and given to the first kernel that takes them;
    batch dimensions are a loop. Where views cannot express it, the weight is
    dequantized and the record says why.

    Args:
        lhs: an array, a `QTensor`, or one of a stack.
        rhs: the same; at least one of the two is quantized.
        dimension_numbers: as in `jax.lax.dot_general`.
        precision: as there.
        preferred_element_type: the result's dtype, as there.
        target: the chip to choose a kernel for; by default the one this runs on.

    Returns:
        The product, and which kernel ran.
    """
    (lc, rc), (lb, rb) = dimension_numbers
    on_left = isinstance(lhs, QTensor | Layer)
    if isinstance(lhs, QTensor | Layer):
        x = rhs.taken() if isinstance(rhs, Layer) else rhs
        x = x.dequantize() if isinstance(x, QTensor) else x
        w, x_dims, w_dims = lhs, (rc, rb), (lc, lb)
    elif isinstance(rhs, QTensor | Layer):
        x, w, x_dims, w_dims = lhs, rhs, (lc, lb), (rc, rb)
    else:
        raise TypeError("neither side is quantized: use jax.lax.dot_general")
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    if isinstance(w, Layer) and (w.kept or w_dims != ((0,), ())):
        w = w.taken()
    multiply_two = functools.partial(
        _matmul, precision=precision, out_dtype=jnp.dtype(dtype), target=target
    )
    try:
        if isinstance(w, Layer):
            y, choice = _by_layer(x, w, x_dims[0][0], multiply_two)
        else:
            y, choice = _as_matrices(x, w, x_dims, w_dims, multiply_two)
    except views.ViewError as reason:
        choice = Choice("dequantize", (("view", str(reason)),))
        w = w.taken() if isinstance(w, Layer) else w
        x, float_w = _float_operands(x, w, x_dims, w_dims)
        pair = (float_w, x) if on_left else (x, float_w)
        y = lax.dot_general(*pair, dimension_numbers, precision, preferred_element_type)
        return y.astype(dtype), choice
    batch, x_free = len(x_dims[1]), x.ndim - len(x_dims[0]) - len(x_dims[1])
    if on_left:
        order = range(batch, batch + x_free), range(batch + x_free, y.ndim)
        y = jnp.transpose(y, (*range(batch), *order[1], *order[0]))
    return y.astype(dtype), choice


def _as_matrices(
    x: jax.Array,
    w: QTensor,
    x_dims: tuple[Axes, Axes],
    w_dims: tuple[Axes, Axes],
    multiply_two: Matmul,
) -> tuple[jax.Array, Choice]:
    """Return the product with axes (batch, free of x, free of w)."""
    (xc, xb), (wc, wb) = x_dims, w_dims
    xf = tuple(i for i in range(x.ndim) if i not in (*xc, *xb))
    wf = tuple(i for i in range(w.ndim) if i not in (*wc, *wb))
    # contracted axes in the weight's own order, so that its packed axis stays last
    order = sorted(range(len(wc)), key=lambda i: wc[i])
    wc, xc = tuple(wc[i] for i in order), tuple(xc[i] for i in order)
    if w.axis % w.ndim not in wc:
        raise views.ViewError("the packed axis is not contracted here")
    batch = tuple(x.shape[i] for i in xb)
    rows, columns = tuple(x.shape[i] for i in xf), tuple(w.shape[i] for i in wf)
    inner = math.prod(w.shape[i] for i in wc)
    if not batch:
        matrix = _arrange(w, (*wc, *wf), (inner, math.prod(columns)))
        flat = jnp.transpose(x, (*xf, *xc)).reshape(-1, inner)
        y, choice = multiply_two(flat, matrix)
        return y.reshape(*rows, *columns), choice
    many = math.prod(batch)
    stack = _arrange(w, (*wb, *wc, *wf), (many, inner, math.prod(columns)))
    stack = _own_scales(stack)
    flat = jnp.transpose(x, (*xb, *xf, *xc)).reshape(many, -1, inner)
    choices: list[Choice] = []

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        y, choice = multiply_two(pair[0], Layer(stack, pair[1]))
        choices.append(choice)
        return y

    y = lax.map(one, (flat, jnp.arange(many, dtype=jnp.int32)))
    return y.reshape(*batch, *rows, *columns), choices[0]


def _by_layer(
    x: jax.Array, w: Layer, contracted: int, multiply_two: Matmul
) -> tuple[jax.Array, Choice]:
    """Return the product with one matrix of a stack, axes (free of x, N)."""
    x = jnp.moveaxis(x, contracted, -1)
    y, choice = multiply_two(x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], y.shape[-1]), choice


def _float_operands(
    x: jax.Array, w: QTensor, x_dims: tuple[Axes, Axes], w_dims: tuple[Axes, Axes]
) -> tuple[jax.Array, jax.Array]:
    """Return the activation, quantized and read back if asked for, and a float weight.

    What the weight asks of the activation's channels is done to them first, so that
    what is quantized is what a kernel would quantize.
    """
    if w.activation is None:
        return x, w.dequantize()
    places = dict(zip(w_dims[0] + w_dims[1], x_dims[0] + x_dims[1], strict=True))

    def fit(a: jax.Array) -> jax.Array:
        """Return ``a``, which has the axes of the weight, with those of ``x``."""
        order = sorted(places, key=lambda axis: places[axis])
        lengths = {places[axis]: a.shape[axis] for axis in order}
        free = [axis for axis in range(w.ndim) if axis not in places]
        shape = [lengths.get(axis, 1) for axis in range(x.ndim)]
        return jnp.transpose(a, (*order, *free)).reshape(shape)

    def fits(a: jax.Array) -> bool:
        """Whether ``a`` is the same along the weight's free axes."""
        return all(n == 1 or axis in places for axis, n in enumerate(a.shape))

    if w.input_index is not None and fits(w.input_index):
        index = fit(w.input_index)
        x = jnp.take_along_axis(x, index, axis=places[w.axis % w.ndim])
        w = dataclasses.replace(w, input_index=None, rows=None)
    if w.input_scale is not None and fits(w.input_scale):
        x = (x.astype(jnp.float32) * fit(w.input_scale)).astype(x.dtype)
        w = dataclasses.replace(w, input_scale=None)
    return quantized_input(x, with_static_scales(w, fit), x_dims[0]), w.dequantize()


def _arrange(w: QTensor, permutation: Axes, shape: Axes) -> QTensor:
    """Transpose and reshape, skipping what changes nothing."""
    if permutation != tuple(range(w.ndim)):
        w = views.transpose(w, permutation)
    return w if w.shape == shape else views.reshape(w, shape)


def _own_scales(w: QTensor) -> QTensor:
    """Give every matrix of a stack its own copy of what the matrices share."""
    w, many, block = views.plain_scales(w), w.shape[0], w.blocks[0]

    def own(a: jax.Array) -> jax.Array:
        if 1 < a.shape[0] < many:
            a = jnp.repeat(a, block, axis=0)[:many]
        return jnp.broadcast_to(a, (many, *a.shape[1:]))

    out = views.map_fields(w, own, codes=w.codes)
    return dataclasses.replace(out, block=(1, *w.blocks[1:]))


def _matmul(
    x: jax.Array,
    w: QTensor | Layer,
    precision: lax.PrecisionLike,
    out_dtype: DTypeLike,
    target: Target | None,
) -> tuple[jax.Array, Choice]:
    """Multiply two matrices, the second quantized, perhaps one of a stack."""
    if isinstance(w, QTensor):
        x, w = scaled_input(*picked_input(x, w))
        return multiply(Problem(x, w, precision, out_dtype=out_dtype), target)
    # what is done to the activation is little: it is taken from the stack here
    beside: dict[str, Any] = {
        name: None if (a := getattr(w.stack, name)) is None else w.of(a)
        for name in BESIDE
    }
    x = (
        x
        if beside["input_index"] is None
        else take_columns(x, beside["input_index"][:, 0])
    )
    if beside["input_scale"] is not None:
        x = (x.astype(jnp.float32) * beside["input_scale"][:, 0]).astype(x.dtype)
    done: dict[str, Any] = {"input_index": None, "input_scale": None, "rows": None}
    stack = dataclasses.replace(w.stack, **(beside | done))
    problem = Problem(x, stack, precision, w.index, out_dtype)
    return multiply(problem, target)
