"""AWQ: finer steps for the channels that carry large activations."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.blocks import spread, to_blocks

SMALLEST = 1e-4


def awq(
    weights: Sequence[jax.Array],
    magnitude: jax.Array,
    tokens: jax.Array,
    group: int | None = None,
    *,
    points: int = 20,
    duo: bool | str = False,
) -> jax.Array:
    """Return scales that protect salient channels, for a search to choose from.

    ``s = x̄^r``, or ``s = x̄^r / (w̄^(1−r) + 1e-4)`` with ``duo``, for r = 0, 1/points …
    1 − 1/points; clamped at 1e-4 and divided by ``√(max s · min s)``. Here x̄ is the
    mean of ``|x|`` in a channel and w̄ that of ``|w| / (max |w| of its group + 1e-6)``
    over the outputs of all consumers (Lin et al. 2024, section 3.2 and official code;
    w̄ comes from AutoAWQ). What is not finite becomes 1, and so does a channel that
    calibration never saw alive: the official clamp would all but erase its weights.

    Args:
        weights: ``float32[*stack, K, N_i]``, the consumers of one activation.
        magnitude: ``float32[*stack, K]``, ``Σ |x_k|`` over tokens.
        tokens: ``int32[*stack]``, how many there were.
        group: rows per scale of the quantized weights; None: all of them.
        points: how many exponents are tried.
        duo: whether the weights' magnitude counts; ``"both"`` tries either.

    Returns:
        ``float32[C, *stack, K]``; the first candidate is 1 everywhere.

    Raises:
        ValueError: when ``points`` or ``duo`` is something else.

    Example:
        >>> w = jnp.ones((2, 1))
        >>> awq([w], jnp.asarray([8.0, 2.0]), jnp.asarray(2), points=2).tolist()
        [[1.0, 1.0], [1.4142135381698608, 0.7071067690849304]]
    """
    if type(points) is not int or points < 1:
        raise ValueError(
            f"points={points!r} must be a whole number from 1; 20 is usual"
        )
    if duo not in (True, False, "both"):
        raise ValueError(f"duo={duo!r} must be True, False or 'both'")
    x = magnitude.astype(jnp.float32) / tokens[..., None].astype(jnp.float32)
    exponents = [i / points for i in range(points)]
    found = []
    if duo in (False, "both"):
        found += [x ** jnp.float32(r) for r in exponents]
    if duo in (True, "both"):
        w = relative_magnitude(weights, group)
        found += [
            x ** jnp.float32(r) / (w ** jnp.float32(1 - r) + jnp.float32(1e-4))
            for r in exponents
        ]
    if duo is True:
        found = [jnp.ones_like(x), *found]
    return _normalized(jnp.stack(found), x > 0)


def relative_magnitude(weights: Sequence[jax.Array], group: int | None) -> jax.Array:
    """Return the mean over outputs of ``|w| / (max |w| of its group + 1e-6)``.

    Args:
        weights: ``float32[*stack, K, N_i]``.
        group: rows per group; None: all.

    Returns:
        ``float32[*stack, K]``.
    """
    total = jnp.float32(0)
    for w in weights:
        size = jnp.abs(w.astype(jnp.float32))
        block = [1] * size.ndim
        block[-2] = min(group or size.shape[-2], size.shape[-2])
        largest = jnp.max(to_blocks(size, block), range(1, 2 * size.ndim, 2))
        share = size / (spread(largest, block, size.shape) + jnp.float32(1e-6))
        total = total + jnp.sum(share, -1)
    return total / sum(w.shape[-1] for w in weights)


def _normalized(scales: jax.Array, alive: jax.Array) -> jax.Array:
    """Clamp candidates, centre their range on 1, and leave dead channels alone."""
    scales = jnp.maximum(scales, SMALLEST)
    largest = jnp.max(scales, -1, keepdims=True, where=alive, initial=0)
    smallest = jnp.min(scales, -1, keepdims=True, where=alive, initial=jnp.inf)
    scales = scales / jnp.sqrt(largest) / jnp.sqrt(smallest)
    usable = alive & jnp.isfinite(scales) & (scales > 0)
    return jnp.where(usable, scales, jnp.float32(1))
