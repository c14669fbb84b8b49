"""Scales from data: the range of least error, weighed by the activations it meets."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.blocks import block_axes, spread, to_blocks
from jaxq.names import lookup, unknown
from jaxq.quantize import Blocking, block_bounds, encode
from jaxq.scales import affine
from jaxq.spec import QuantSpec

Scales = tuple[jax.Array, jax.Array | None]
Loss = Callable[[jax.Array], jax.Array]


class Groups(NamedTuple):
    """Row groups of a weight (or one, without the first axis), and what errors cost.

    Attributes:
        weight: ``float32[R, G, *free]``; ragged groups end in zeros.
        importance: ``float32[R, G]``, what the square of an error costs; None: all the
            same.
        gram: ``float32[R, G, G]``, the diagonal blocks of the Gram matrix, or None.
    """

    weight: jax.Array
    importance: jax.Array | None = None
    gram: jax.Array | None = None


def absmax(groups: Groups, spec: QuantSpec, where: Blocking) -> Scales:
    """Return the scales by which nothing is clipped."""
    return affine(*block_bounds(groups.weight, where.block), spec)


def mse(
    groups: Groups,
    spec: QuantSpec,
    where: Blocking,
    *,
    steps: int = 48,
    smallest: float = 0.2,
    exponent: float = 2.0,
) -> Scales:
    """Return the scales of least ``Σ |w − ŵ|^exponent``; see `importance`."""
    alike = groups._replace(importance=None)
    return importance(
        alike, spec, where, steps=steps, smallest=smallest, exponent=exponent
    )


def importance(
    groups: Groups,
    spec: QuantSpec,
    where: Blocking,
    *,
    steps: int = 48,
    smallest: float = 0.2,
    exponent: float = 2.0,
) -> Scales:
    """Return the scales of least ``Σ_k h_k |w_k − ŵ_k|^exponent``; see `best_range`.

    An error costs as much as its row is important.
    """
    h = groups.importance
    h = jnp.ones(len(groups.weight), jnp.float32) if h is None else h

    def loss(error: jax.Array) -> jax.Array:
        size = jnp.square(error) if exponent == 2 else jnp.abs(error) ** exponent
        return _per_block(h, size, where)

    return best_range(groups.weight, spec, where, loss, (steps, smallest))


def output(
    groups: Groups,
    spec: QuantSpec,
    where: Blocking,
    *,
    steps: int = 24,
    smallest: float = 0.2,
) -> Scales:
    """Return the scales of least output error of each group alone; see `best_range`.

    ``δᵀ H_gg δ`` with ``δ = w − ŵ``: unlike `importance` it knows which activations of
    a group go together (AWQ's clip search measures the same on samples).
    """
    assert groups.gram is not None
    gram = groups.gram

    def loss(error: jax.Array) -> jax.Array:
        flat = error.reshape(len(error), -1)
        felt = jnp.dot(gram, flat, precision=lax.Precision.HIGHEST)
        ones = jnp.ones(len(error), jnp.float32)
        return _per_block(ones, (flat * felt).reshape(error.shape), where)

    return best_range(groups.weight, spec, where, loss, (steps, smallest))


def _per_block(h: jax.Array, cost: jax.Array, where: Blocking) -> jax.Array:
    """Return the costs of rows, weighed by ``h``, summed over every block.

    As a product with a vector: XLA:CPU sums over rows three times slower.
    """
    columns = jnp.dot(h, cost.reshape(len(cost), -1), precision=lax.Precision.HIGHEST)
    blocks = to_blocks(columns.reshape(cost.shape[1:]), where.block[1:])
    return jnp.sum(blocks, block_axes(cost.ndim - 1))[None]


# Ranges up to this much wider than the extremes are tried: a zero point is an integer,
# and its rounding may leave one end out.
WIDEST = 1.15


def best_range(
    x: jax.Array,
    spec: QuantSpec,
    where: Blocking,
    loss: Loss,
    tried: tuple[int, float],
) -> Scales:
    """Return the scales of the range ``p · [low, high]`` of least ``loss(x − x̂)``.

    Two thirds of the ``steps`` are values of ``p`` from 1.15 to ``smallest``, the rest
    lie around each block's best one. Each is tried with the zero point as it comes out
    and with both its neighbours.

    Args:
        x: the weight, float32.
        spec: how it is quantized.
        where: its blocks.
        loss: the cost of an error, one number per block.
        tried: ``steps`` and ``smallest``.
    """
    low, high = block_bounds(x, where.block)
    fmt = spec.number_format

    class Best(NamedTuple):
        loss: jax.Array
        centre: jax.Array
        scales: Scales

    def attempt(best: Best, this: Attempt) -> tuple[Best, None]:
        p = jnp.where(this.fine, best.centre, jnp.float32(0)) + this.p
        scale, zero = affine(low * p, high * p, spec)
        if zero is not None:
            zero = jnp.clip(zero + this.shift, fmt.lowest, fmt.highest)
        now = loss(x - _round_trip(x, (scale, zero), spec, where))
        better = now < best.loss
        keep = lambda new, old: jnp.where(better, new, old)
        centre = jnp.where(this.fine, best.centre, keep(p, best.centre))
        scales = jax.tree.map(keep, (scale, zero), best.scales)
        return Best(keep(now, best.loss), centre, scales), None

    ones = jnp.ones(low.shape, jnp.float32)
    start = Best(jnp.inf * ones, ones, affine(low, high, spec))
    best, _ = lax.scan(attempt, start, _attempts(*tried, not spec.symmetric))
    return best.scales


class Attempt(NamedTuple):
    """A range to try.

    Attributes:
        p: the range over the whole one; when ``fine``, less the best of the others.
        fine: whether it is.
        shift: what is added to the zero point.
    """

    p: jax.Array
    fine: jax.Array
    shift: jax.Array


def _attempts(steps: int, smallest: float, shifted: bool) -> Attempt:
    """Return what is tried, one after the other; see `best_range`."""
    coarse = max(steps - steps // 3, 1)
    gap = (WIDEST - smallest) / max(coarse - 1, 1)
    # between the coarse ones beside the best, and none of them again
    fine = np.linspace(-gap, gap, steps - coarse + 2)[1:-1]
    p = np.concatenate([[1.0], np.linspace(WIDEST, smallest, coarse), fine])
    is_fine = np.arange(len(p)) > coarse
    shifts = (0.0, -1.0, 1.0) if shifted else (0.0,)
    return Attempt(
        jnp.asarray(np.repeat(p, len(shifts)), jnp.float32),
        jnp.asarray(np.repeat(is_fine, len(shifts))),
        jnp.asarray(np.tile(shifts, len(p)), jnp.float32),
    )


def _round_trip(
    x: jax.Array, scales: Scales, spec: QuantSpec, where: Blocking
) -> jax.Array:
    """Return ``x`` rounded with the scales and read back."""
    scale, zero = scales
    values = spec.number_format.decode(encode(x, scale, zero, spec, where.block))
    if zero is not None:
        values = values - spread(zero, where.block, x.shape)
    return values * spread(scale, where.block, x.shape)


# `conditional` differs in the importance that GPTQ gives to rows.
SEARCHES: dict[str, Callable[..., Scales]] = {
    "absmax": absmax,
    "mse": mse,
    "importance": importance,
    "conditional": importance,
    "output": output,
}


def search_scales(
    groups: Groups,
    spec: QuantSpec,
    free_block: Sequence[int],
    search: str,
    options: Sequence[tuple[str, Any]] = (),
) -> Scales:
    """Return scales and zero points, ``[R, *free blocks]``, by the ``search`` named.

    They read as stored, unless the scales are quantized in turn.

    Args:
        groups: the weight by row groups.
        spec: how it is quantized.
        free_block: the block sizes along the free axes.
        search: a key of `SEARCHES`.
        options: of the search, as pairs.
    """
    where = Blocking((groups.weight.shape[1], *free_block), contracting=(0,))

    # one group after the other: it stays in the cache, and memory does not grow
    def one(group: Groups) -> Scales:
        scales = SEARCHES[search](group, spec, where, **dict(options))
        return jax.tree.map(lambda s: jnp.squeeze(s, 0), scales)

    if len(groups.weight) == 1:
        return jax.tree.map(
            lambda s: s[None], one(jax.tree.map(lambda x: x[0], groups))
        )
    return lax.map(one, groups)


def check_search(search: str, options: Sequence[tuple[str, Any]]) -> None:
    """Raise unless there is such a search and it takes these options.

    Raises:
        UnknownNameError: naming what is not known, and what is.
        ValueError: on a number out of range.
    """
    method = lookup(SEARCHES, search, "scale search")
    parameters = inspect.signature(method).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name, _ in options:
        if name not in known:
            raise unknown(name, known, f"option of search={search!r}:")
    given = dict(options)
    steps, smallest = given.get("steps", 1), given.get("smallest", 0.5)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer >= 1; 48 is usual")
    if not 0 < smallest <= 1:
        raise ValueError(
            f"smallest={smallest} is the narrowest range tried, as a share of the "
            f"whole: give it in (0, 1]; 0.2 is usual"
        )
