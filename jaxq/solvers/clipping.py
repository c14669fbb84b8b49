"""The range of a block: its extremes, a quantile, or the one of least error."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.blocks import block_axes, spread, to_blocks
from jaxq.names import lookup, unknown
from jaxq.quantize import Blocking, Bounds, block_bounds, encode, settle_scale
from jaxq.scales import affine
from jaxq.spec import QuantSpec


def absmax(x: jax.Array, spec: QuantSpec, where: Blocking) -> Bounds:
    """Return the extremes of every block: nothing is clipped."""
    return block_bounds(x, where.block)


def percentile(
    x: jax.Array, spec: QuantSpec, where: Blocking, *, percent: float = 99.9
) -> Bounds:
    """Return the quantiles ``1 − percent`` and ``percent`` of every block.

    Args:
        x: float32.
        spec: unused; every clipping method takes it.
        where: the blocks.
        percent: between 50 and 100; 100 clips nothing.

    Raises:
        ValueError: when ``percent`` is out of range.
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percent={percent} must lie in (50, 100]; 99.9 is usual")
    blocks = to_blocks(x.astype(jnp.float32), where.block, fill=float("nan"))
    axes = block_axes(x.ndim)
    cuts = jnp.asarray([1 - percent / 100, percent / 100], jnp.float32)
    low, high = jnp.nanquantile(blocks, cuts, axes)
    return low, high


def mse(
    x: jax.Array,
    spec: QuantSpec,
    where: Blocking,
    *,
    steps: int = 80,
    smallest: float = 0.21,
    exponent: float = 2.4,
) -> Bounds:
    """Return the range ``p · [low, high]`` of least error for every block.

    ``argmin_p Σ |x − x̂_p|^exponent`` over ``p = 1 … smallest`` (GPTQ's ``mse`` grid of
    1, 0.99 … 0.21: Frantar et al. 2022, official code; 2.4 weighs large errors more
    than squares do).

    Args:
        x: float32.
        spec: how it will be quantized.
        where: the blocks.
        steps: how many ranges are tried.
        smallest: the smallest ``p``.
        exponent: of the error.
    """
    low, high = block_bounds(x, where.block)
    shrink = jnp.linspace(1.0, smallest, steps, dtype=jnp.float32)

    def error(p: jax.Array) -> jax.Array:
        rounded = round_trip(x, (low * p, high * p), spec, where)
        loss = jnp.abs(x - rounded) ** exponent
        return jnp.sum(to_blocks(loss, where.block), block_axes(x.ndim))

    def step(best: tuple[jax.Array, jax.Array], p: jax.Array) -> tuple[Any, None]:
        loss = error(p)
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, p, best[1])), None

    start = (jnp.full(low.shape, jnp.inf), jnp.ones(low.shape))
    (_, p), _ = lax.scan(step, start, shrink)
    return low * p, high * p


def round_trip(
    x: jax.Array, bounds: Bounds, spec: QuantSpec, where: Blocking
) -> jax.Array:
    """Return ``x`` quantized within ``bounds`` and read back, float32, unpacked."""
    scale, zero = affine(*bounds, spec)
    _, scale = settle_scale(scale, spec, where)
    codes = encode(x, scale, zero, spec, where.block)
    values = spec.number_format.decode(codes)
    if zero is not None:
        values = values - spread(zero, where.block, x.shape)
    return values * spread(scale, where.block, x.shape)


CLIPPING: dict[str, Callable[..., Bounds]] = {
    "absmax": absmax,
    "percentile": percentile,
    "mse": mse,
}


def clipped_bounds(
    x: jax.Array,
    spec: QuantSpec,
    where: Blocking,
    clip: str,
    options: dict[str, Any] | None = None,
) -> Bounds:
    """Return the range of every block by the method called ``clip``.

    Raises:
        UnknownNameError: when there is no such method, or it has no such option.
    """
    method = lookup(CLIPPING, clip, "clipping method")
    options = options or {}
    parameters = inspect.signature(method).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown(name, known, f"option of clip={clip!r}:")
    return method(x.astype(jnp.float32), spec, where, **options)
