"""Mixture-of-experts products: `jax.lax.ragged_dot` with stacked quantized experts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.ops.activation import quantized_input, with_static_scales
from jaxq.ops.problem import Choice
from jaxq.qtensor import QTensor
from jaxq.relayout import PLANAR, relayout
from jaxq.views import ViewError
from pallas_kernels.xla import tiled_dot


def ragged_dot(
    x: jax.Array,
    w: QTensor,
    group_sizes: jax.Array,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> tuple[jax.Array, Choice]:
    """Return ``y[m] = x[m] @ w[expert of m]``, a tile of all experts at a time.

    Args:
        x: tokens sorted by expert, ``[M, K]``.
        w: ``[experts, K, N]``, packed along K.
        group_sizes: tokens per expert, int ``[experts]``.
        precision: as in `jax.lax.ragged_dot`.
        preferred_element_type: the result's dtype.

    Raises:
        ViewError: when the weight is packed along another axis, carries an offset, or
            is binary-coded.
    """
    if w.axis % w.ndim != 1 or w.ndim != 3:
        raise ViewError("the experts are not packed along the contracted axis")
    if w.offset is not None:
        raise ViewError("the experts carry an offset")
    if w.spec.binary:
        raise ViewError("the experts are binary-coded")
    w = relayout(w, PLANAR)
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    x, w = _expert_input(x, w, group_sizes)
    experts, _, columns = w.shape

    def per_column(values: jax.Array) -> jax.Array:
        values = jnp.repeat(values, w.blocks[2] if values.shape[2] > 1 else columns, 2)
        return values[..., :columns]

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.ragged_dot(
            a, b, group_sizes, precision, preferred_element_type=jnp.float32
        )

    zeros = w.zeros
    y = tiled_dot(
        quantized_input(x, w),
        w.codes,
        per_column(w.scale_values()),
        None if zeros is None else per_column(zeros.astype(jnp.float32)),
        bits=w.spec.bits,
        pack=w.pack,
        group=w.blocks[1],
        decode=w.spec.number_format.decode,
        dot=dot,
        precision=precision,
    )
    return y.astype(dtype), Choice(f"xla.tiled_ragged_dot ({experts} experts)")


def _expert_input(
    x: jax.Array, w: QTensor, group_sizes: jax.Array
) -> tuple[jax.Array, QTensor]:
    """Do to every token what its expert asks of the activation.

    Input indices and input scales are applied; static activation scales become one per
    token.
    """
    ends = jnp.cumsum(group_sizes)
    token = jnp.arange(x.shape[0], dtype=ends.dtype)
    owner = jnp.searchsorted(ends, token, side="right", method="compare_all")

    def of_owner(values: jax.Array) -> jax.Array:
        """Return ``[M or 1, K or 1]`` of one value per expert and channel."""
        values = values.reshape(values.shape[:2])
        # tokens behind the last expert's have no owner, and no result either
        return values if values.shape[0] == 1 else values.at[owner].get(mode="clip")

    if w.input_index is not None:
        x = jnp.take_along_axis(x, of_owner(w.input_index), axis=1)
    if w.input_scale is not None:
        x = (x.astype(jnp.float32) * of_owner(w.input_scale)).astype(x.dtype)
    w = dataclasses.replace(w, input_index=None, rows=None, input_scale=None)
    return x, with_static_scales(w, of_owner)
