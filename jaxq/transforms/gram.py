"""How the Gram matrix of an activation changes with the activation."""

import jax
import jax.numpy as jnp


def scale_gram(gram: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the Gram matrix of ``x / s``: ``G_ij / (s_i · s_j)``.

    Args:
        gram: ``float32[*stack, K, K]``, ``Σ x xᵀ``.
        scale: ``float32[*stack, K]``, by which a transform divides the activation.

    Example:
        >>> scale_gram(jnp.full((2, 2), 8.0), jnp.asarray([2.0, 4.0])).tolist()
        [[2.0, 1.0], [1.0, 0.5]]
    """
    return gram / scale[..., :, None] / scale[..., None, :]


def expand_gram(gram: jax.Array, index: jax.Array) -> jax.Array:
    """Return the Gram matrix of ``x[..., index]``: ``G[index_i, index_j]``.

    Args:
        gram: ``float32[*stack, K, K]``.
        index: ``int32[K']`` or ``int32[*stack, K']``.

    Example:
        >>> gram = jnp.asarray([[1.0, 2.0], [2.0, 5.0]])
        >>> expand_gram(gram, jnp.asarray([0, 1, 0])).tolist()
        [[1.0, 2.0, 1.0], [2.0, 5.0, 2.0], [1.0, 2.0, 1.0]]
    """
    index = index.reshape((1,) * (gram.ndim - 1 - index.ndim) + index.shape)
    rows = jnp.take_along_axis(gram, index[..., :, None], axis=-2)
    return jnp.take_along_axis(rows, index[..., None, :], axis=-1)
