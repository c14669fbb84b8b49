"""Scales from data: the range of least error, weighed by the activations it meets."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.blocks import block_axes, spread, to_blocks
from jaxq.names import lookup, unknown
from jaxq.quantize import Blocking, block_bounds, encode
from jaxq.scales import affine
from jaxq.spec import QuantSpec

Scales = tuple[jax.Array, jax.Array | None]


class Groups(NamedTuple):
    """Row groups of a weight, and how much an error of each row costs.

    Attributes:
        weight: ``float32[R, G, *free]``; ragged groups end in zeros.
        importance: ``float32[R, G]``, for example the diagonal of the Hessian.
    """

    weight: jax.Array
    importance: jax.Array


def absmax(groups: Groups, spec: QuantSpec, where: Blocking) -> Scales:
    """Return the scales by which nothing is clipped."""
    return affine(*block_bounds(groups.weight, where.block), spec)


def mse(
    groups: Groups,
    spec: QuantSpec,
    where: Blocking,
    *,
    steps: int = 40,
    smallest: float = 0.2,
    exponent: float = 2.0,
) -> Scales:
    """Return the scales of the range ``p · [low, high]`` of least error.

    ``argmin_p Σ |w − ŵ_p|^exponent`` over ``steps`` values of ``p`` from 1 to
    ``smallest``.
    """
    alike = groups._replace(importance=jnp.ones_like(groups.importance))
    return importance(
        alike, spec, where, steps=steps, smallest=smallest, exponent=exponent
    )


def importance(
    groups: Groups,
    spec: QuantSpec,
    where: Blocking,
    *,
    steps: int = 40,
    smallest: float = 0.2,
    exponent: float = 2.0,
) -> Scales:
    """Return the scales of the range ``p · [low, high]`` of least weighed error.

    ``argmin_p Σ_k h_k |w_k − ŵ_k(p)|^exponent``, where ``h`` is the importance of rows:
    an error costs as much as its activation is large.
    """
    x = groups.weight
    h = groups.importance.reshape(groups.importance.shape + (1,) * (x.ndim - 2))

    def loss(error: jax.Array) -> jax.Array:
        size = jnp.square(error) if exponent == 2 else jnp.abs(error) ** exponent
        return jnp.sum(to_blocks(h * size, where.block), block_axes(x.ndim))

    return _best_range(x, spec, where, loss, jnp.linspace(1.0, smallest, steps))


def _best_range(
    x: jax.Array,
    spec: QuantSpec,
    where: Blocking,
    loss: Callable[[jax.Array], jax.Array],
    shrink: jax.Array,
) -> Scales:
    """Return the scales of ``p · [low, high]`` with the least ``loss(x − x̂)``."""
    low, high = block_bounds(x, where.block)

    class Best(NamedTuple):
        loss: jax.Array
        scales: Scales

    def step(best: Best, p: jax.Array) -> tuple[Best, None]:
        scales = affine(low * p, high * p, spec)
        now = loss(x - _round_trip(x, scales, spec, where))
        better = now < best.loss
        keep = lambda new, old: jnp.where(better, new, old)
        return Best(keep(now, best.loss), jax.tree.map(keep, scales, best.scales)), None

    start = Best(jnp.full(low.shape, jnp.inf), affine(low, high, spec))
    best, _ = lax.scan(step, start, shrink.astype(jnp.float32))
    return best.scales


def _round_trip(
    x: jax.Array, scales: Scales, spec: QuantSpec, where: Blocking
) -> jax.Array:
    """Return ``x`` rounded with the scales and read back."""
    scale, zero = scales
    values = spec.number_format.decode(encode(x, scale, zero, spec, where.block))
    if zero is not None:
        values = values - spread(zero, where.block, x.shape)
    return values * spread(scale, where.block, x.shape)


SEARCHES: dict[str, Callable[..., Scales]] = {
    "absmax": absmax,
    "mse": mse,
    "importance": importance,
}


def search_scales(
    groups: Groups,
    spec: QuantSpec,
    free_block: Sequence[int],
    search: str,
    options: dict[str, Any],
) -> Scales:
    """Return scales and zero points, ``[R, *free blocks]``, by the ``search`` named.

    They read as stored, unless the scales are quantized in turn.

    Args:
        groups: the weight by row groups.
        spec: how it is quantized.
        free_block: the block sizes along the free axes.
        search: a key of `SEARCHES`.
        options: of the search.
    """
    block = (1, groups.weight.shape[1], *free_block)
    where = Blocking(block, contracting=(1,), stacked=(0,))
    scales = SEARCHES[search](groups, spec, where, **options)
    return jax.tree.map(lambda s: jnp.squeeze(s, 1), scales)


def check_search(search: str, options: Sequence[str]) -> None:
    """Raise unless there is such a search and it has these options.

    Raises:
        UnknownNameError: naming what is not known, and what is.
    """
    method = lookup(SEARCHES, search, "scale search")
    parameters = inspect.signature(method).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown(name, known, f"option of search={search!r}:")
