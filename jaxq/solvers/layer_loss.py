"""The squared error of a layer's output, from the Gram matrix of its input."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.qtensor import QTensor
from jaxq.quantize import Axes, Blocking
from jaxq.spec import QuantSpec


def layer_loss(
    weight: jax.Array,
    approximation: jax.Array | QTensor,
    gram: jax.Array,
    *,
    axis: Axes = None,
    stacked: Sequence[int] = (),
) -> jax.Array:
    """Return ``‖X(W − Ŵ)‖² = tr(Δᵀ XᵀX Δ)`` of every stacked weight, ``[*stack]``.

    A sum over tokens and outputs, as the Gram matrix is.

    Args:
        weight: float, any shape.
        approximation: of the same shape.
        gram: ``float32[*stack, K, K]``, ``XᵀX``.
        axis: the contracted axes.
        stacked: axes that enumerate independent weights.

    Example:
        >>> import jax.numpy as jnp
        >>> layer_loss(jnp.eye(2), jnp.zeros((2, 2)), jnp.diag(jnp.asarray([3.0, 4.0])))
        Array(7., dtype=float32)
    """
    where = Blocking.of(QuantSpec("int8"), weight.shape, axis, stacked)
    if isinstance(approximation, QTensor):
        approximation = approximation.dequantize(jnp.float32)
    error = weight.astype(jnp.float32) - approximation.astype(jnp.float32)
    kept = where.stacked + where.contracting
    free = tuple(a for a in range(weight.ndim) if a not in kept)
    stack = [weight.shape[a] for a in where.stacked]
    error = error.transpose(kept + free).reshape(*stack, gram.shape[-1], -1)
    felt = jnp.matmul(gram, error, precision=lax.Precision.HIGHEST)
    return jnp.sum(error * felt, (-2, -1))
