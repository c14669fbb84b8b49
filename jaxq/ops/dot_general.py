"""`jax.lax.dot_general` with a `QTensor` on either side."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq import views
from jaxq.ops.activation import (
    picked_input,
    quantized_input,
    scaled_input,
    with_static_scales,
)
from jaxq.ops.dispatch import Choice, Problem, multiply
from jaxq.qtensor import QTensor

Axes = tuple[int, ...]
DimensionNumbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]


def dot_general(
    lhs: "jax.Array | QTensor",
    rhs: "jax.Array | QTensor",
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> tuple[jax.Array, Choice]:
    """Return ``lax.dot_general`` of an activation and a quantized weight.

    The operands are brought to ``x[M, K] @ w[K, N]`` by views (no codes are moved
    unless the weight is transposed) and given to the first kernel that takes them;
    batch dimensions are a loop. Where views cannot express it, the weight is
    dequantized and the record says why.

    Args:
        lhs: an array or a `QTensor`.
        rhs: an array or a `QTensor`; at least one of the two is quantized.
        dimension_numbers: as in `jax.lax.dot_general`.
        precision: as there.
        preferred_element_type: the result's dtype, as there.

    Returns:
        The product, and which kernel ran.
    """
    (lc, rc), (lb, rb) = dimension_numbers
    on_left = isinstance(lhs, QTensor)
    if isinstance(lhs, QTensor):
        x = rhs.dequantize() if isinstance(rhs, QTensor) else rhs
        w, x_dims, w_dims = lhs, (rc, rb), (lc, lb)
    elif isinstance(rhs, QTensor):
        x, w, x_dims, w_dims = lhs, rhs, (lc, lb), (rc, rb)
    else:
        raise TypeError("neither side is quantized: use jax.lax.dot_general")
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    try:
        y, choice = _as_matrices(x, w, x_dims, w_dims, precision)
    except views.ViewError as reason:
        choice = Choice("dequantize", (("view", str(reason)),))
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
    precision: lax.PrecisionLike,
) -> tuple[jax.Array, Choice]:
    """Return the product with axes (batch, free of x, free of w), in float32."""
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
        y, choice = _matmul(flat, matrix, precision)
        return y.reshape(*rows, *columns), choice
    many = math.prod(batch)
    stack = _arrange(w, (*wb, *wc, *wf), (many, inner, math.prod(columns)))
    stack = _own_scales(stack)
    flat = jnp.transpose(x, (*xb, *xf, *xc)).reshape(many, -1, inner)
    choices: list[Choice] = []

    def one(pair: tuple[jax.Array, QTensor]) -> jax.Array:
        y, choice = _matmul(*pair, precision)
        choices.append(choice)
        return y

    y = lax.map(one, (flat, stack))
    return y.reshape(*batch, *rows, *columns), choices[0]


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
    x: jax.Array, w: QTensor, precision: lax.PrecisionLike
) -> tuple[jax.Array, Choice]:
    """Multiply two matrices, the second quantized."""
    x, w = scaled_input(*picked_input(x, w))
    return multiply(Problem(x, w, precision))
