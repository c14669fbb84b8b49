"""The rows of an activation that count, on any kind of mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.explicit_axes import replicated


class Rows(NamedTuple):
    """A batch of one activation, its features last.

    Attributes:
        values: ``float32[..., K]``; rows that do not count are zeros.
        keep: ``bool[..., 1]``, whether the row counts.
        tokens: how many rows count, int32.
    """

    values: jax.Array
    keep: jax.Array
    tokens: jax.Array


def rows_of(x: jax.Array, mask: jax.Array | None = None) -> Rows:
    """Return the rows of ``x`` that ``mask`` lets count.

    Args:
        x: ``[..., K]``; a scalar is one row of one feature.
        mask: bool, broadcasting to ``x.shape[:-1]``; None: all rows count.

    Raises:
        ValueError: when the mask is not of bools, or does not broadcast.
    """
    x = x[None] if x.ndim == 0 else x
    leading = x.shape[:-1]
    mask = jnp.ones(leading, bool) if mask is None else _broadcast(mask, leading)
    keep = mask[..., None]
    # Selected, not multiplied: padding may hold NaN.
    values = jnp.where(keep, x.astype(jnp.float32), jnp.float32(0))
    return Rows(values, keep, jnp.sum(mask, dtype=jnp.int32))


def observe(
    see: Callable[..., Any], x: jax.Array, mask: jax.Array | None, *more: jax.Array
) -> Any:
    """Return ``see(rows of x, *more)``, replicated when the mesh asks who holds it."""

    def run(x: jax.Array, mask: jax.Array | None, *more: jax.Array) -> Any:
        return see(rows_of(x, mask), *more)

    return replicated(run, jnp.asarray(x), mask, *more)


def width(like: jax.ShapeDtypeStruct) -> int:
    """Return how many features an activation has."""
    return like.shape[-1] if like.shape else 1


def _broadcast(mask: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    """Return the mask at its full shape."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {mask.dtype.name}, but it must be bool, True where a row "
            f"counts: pass mask != 0"
        )
    try:
        return jnp.broadcast_to(mask, leading)
    except ValueError as error:
        raise ValueError(
            f"mask has shape {mask.shape}, which does not broadcast to {leading}, the "
            f"activation's axes before its features: one bool per token"
        ) from error
