"""Whether a transform kept the float function."""

import jax
import jax.numpy as jnp


def function_preserved(
    weight: jax.Array,
    changed: jax.Array,
    *,
    scale: jax.Array | None = None,
    index: jax.Array | None = None,
    tolerance: float = 1e-5,
) -> jax.Array:
    """Return whether ``(x / s)[..., index] @ w' = x @ w`` for every x, up to rounding.

    True where ``|Σ_i w'_i / s_k − w_k| ≤ tolerance · max |w_k|`` in every channel k,
    summed over the rows i with ``index_i = k``.

    Args:
        weight: ``float[*stack, K, N]``.
        changed: ``float[*stack, K', N]``, what the transforms made of it.
        scale: ``float[*stack, K]``, what the activation is divided by; None: 1.
        index: ``int32[K']`` or ``int32[*stack, K']``, the channel of each row; None:
            its own.
        tolerance: relative to the largest weight of a channel.

    Returns:
        ``bool[*stack]``.

    Example:
        >>> w, s = jnp.asarray([[2.0], [3.0]]), jnp.asarray([4.0, 0.5])
        >>> bool(function_preserved(w, w * s[:, None], scale=s))
        True
        >>> bool(function_preserved(w, w * s[:, None]))
        False
    """
    if index is not None:
        index = jnp.broadcast_to(index, (*changed.shape[:-2], index.shape[-1]))
        changed = _added(changed, index, jnp.zeros(weight.shape, changed.dtype))
    if scale is not None:
        changed = changed / scale[..., :, None]
    error = jnp.max(jnp.abs(changed - weight.astype(changed.dtype)), -1)
    allowed = jnp.max(jnp.abs(weight), -1).astype(error.dtype) * tolerance
    return jnp.all(error <= allowed, -1)


def _added(rows: jax.Array, index: jax.Array, zero: jax.Array) -> jax.Array:
    """Add ``rows[*stack, K', N]`` to the channels of ``zero[*stack, K, N]``."""
    if rows.ndim > 2:
        return jax.vmap(_added)(rows, index, zero)
    return zero.at[index].add(rows)
