"""Mixture-of-experts products: `jax.lax.ragged_dot` with stacked quantized experts."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.ops.activation import quantized_input
from jaxq.ops.dispatch import Choice
from jaxq.qtensor import QTensor
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
        ViewError: when the weight is packed along another axis, or carries an offset or
            an input scale.
    """
    if w.axis % w.ndim != 1 or w.ndim != 3:
        raise ViewError("the experts are not packed along the contracted axis")
    if w.offset is not None or w.input_scale is not None:
        raise ViewError("the experts carry an offset or an input scale")
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
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    return y.astype(dtype), Choice(f"xla.tiled_ragged_dot ({experts} experts)")
