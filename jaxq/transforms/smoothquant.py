"""SmoothQuant: share the range of activation channels between both operands."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST = 1e-5
SEARCHED = tuple(np.arange(30, 100, 5) / 100)


def smoothquant(
    weights: Sequence[jax.Array],
    absmax: jax.Array,
    group: int | None = None,
    *,
    alpha: float | str = 0.5,
) -> jax.Array:
    """Return scales that move outliers from the activation to the weights.

    ``s_k = max|x_k|^α / max|w_k|^(1−α)``, the second maximum over all the weights that
    share the activation, both clamped at 1e-5 (Xiao et al. 2023, equation 4). At α = ½
    both operands have the same range in every channel. A channel that is zero on
    either side keeps its scale: 1.

    Args:
        weights: ``float32[*stack, K, N_i]``, the consumers of one activation.
        absmax: ``float32[*stack, K]``, ``max |x_k|`` over all tokens.
        group: unused; every scaling transform takes it.
        alpha: how much of the range moves, from 0 (all of the weight's range to the
            activation) to 1 (the converse); published: 0.5 for OPT and BLOOM, 0.8
            Mistral, 0.85 to 0.9 Llama. ``"search"`` proposes 0.3, 0.35 … 0.95, and no
            scaling.

    Returns:
        ``float32[C, *stack, K]``, one candidate for a number, 15 for a search.

    Raises:
        ValueError: when ``alpha`` is neither.

    Example:
        >>> w, absmax = jnp.asarray([[1.0], [4.0]]), jnp.asarray([16.0, 4.0])
        >>> smoothquant([w], absmax).tolist()
        [[4.0, 1.0]]
    """
    alphas = SEARCHED if alpha == "search" else (_checked(alpha),)
    largest = [jnp.max(jnp.abs(w.astype(jnp.float32)), -1) for w in weights]
    w = jnp.max(jnp.stack(largest), 0)
    x = absmax.astype(jnp.float32)
    alive = (x > 0) & (w > 0)
    x, w = jnp.maximum(x, SMALLEST), jnp.maximum(w, SMALLEST)

    def scale(alpha: float) -> jax.Array:
        ratio = x ** jnp.float32(alpha) / w ** jnp.float32(1 - alpha)
        return jnp.where(alive, jnp.maximum(ratio, SMALLEST), jnp.float32(1))

    none = [jnp.ones_like(x)] if alpha == "search" else []
    return jnp.stack([*none, *map(scale, alphas)])


def _checked(alpha: float | str) -> float:
    """Return ``alpha`` when it is a number that makes sense."""
    known = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not known or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha!r} must be a number from 0 to 1 (0.5 is usual), or 'search'"
        )
    return float(alpha)
