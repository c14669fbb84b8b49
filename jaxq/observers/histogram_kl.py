"""The range whose quantized distribution resembles the float one most."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.observers.base import (
    Bounds,
    Observer,
    honest,
    refuse_other_than_integers,
)
from jaxq.observers.histogram import Histogram, histogram
from jaxq.spec import QuantSpec

_EPSILON = 1e-4


def histogram_kl(bins: int = 4096) -> Observer:
    """Return the observer of TensorRT's entropy calibration.

    For every threshold T of whole bins: P is the histogram within ±T, with what lies
    outside added to its edge bins; Q is the histogram within ±T *without* that, merged
    to as many levels as there are codes and spread again evenly over the bins where P
    is not empty. Empty bins of both get ε = 1e-4 counts, taken from the others. The
    range is ±T of least ``KL(P ‖ Q) = Σ p log(p / q)``, within the observed extremes
    (Migacz 2017; MXNet's ``_get_optimal_threshold``).

    There are 2^b − 1 levels on [−T, T]; activations that are nowhere negative have 2^b
    on [0, T] when the codes are unsigned or asymmetric. A bin belongs to the level that
    holds its centre; MXNet adds the remainder to the last level, and by a stop index of
    −1 leaves its last bin out. Exact zeros, which every threshold keeps, do not count.

    Args:
        bins: of the histogram, a power of two. T is at least half a code range of bins,
            so finds nothing below ``2^b / bins`` of the range: more bins see deeper.

    Raises:
        ValueError: when ``bins`` is out of range; by ``bounds`` when the codes are not
            evenly spaced, or there are fewer bins than codes on one side.

    Example:
        >>> observer = histogram_kl()
        >>> x = jax.random.laplace(jax.random.key(0), (500, 80))
        >>> state = observer.update(observer.init(x), x)
        >>> low, high = observer.bounds(state, QuantSpec("int4", "tensor"))
        >>> bool(high < 0.8 * state.high)
        True
    """
    return histogram(bins, kl_bounds)


@functools.partial(jax.jit, static_argnames=("spec",))
def kl_bounds(state: Histogram, spec: QuantSpec) -> Bounds:
    """Return the range of least divergence; see `histogram_kl`."""
    thresholds, divergence = kl_curve(state, spec)
    clip = thresholds[jnp.argmin(divergence)].astype(jnp.float32) * state.bin_width
    return honest(state, jnp.maximum(state.low, -clip), jnp.minimum(state.high, clip))


def kl_curve(state: Histogram, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Return all thresholds, in bins, and the divergence of each.

    Raises:
        ValueError: as `histogram_kl` says.
    """
    refuse_other_than_integers(spec, "histogram_kl")
    half = state.counts.shape[0] // 2
    if half < 2**spec.bits:
        raise ValueError(
            f"{2 * half} bins are too few for {spec.format!r}: with bins >= "
            f"{2 ** (spec.bits + 1)} every code has one on each side of zero"
        )
    all_positive = not spec.symmetric or spec.number_format.lowest == 0
    one_sided = (state.low >= 0) & all_positive
    thresholds = jnp.arange(2 ** (spec.bits - 1), half + 1, dtype=jnp.int32)
    divergence = lax.map(
        lambda t: _divergence(state.counts, t, one_sided, 2**spec.bits), thresholds
    )
    return thresholds, divergence


def _divergence(
    counts: jax.Array, threshold: jax.Array, one_sided: jax.Array, codes: int
) -> jax.Array:
    """Return KL(P ‖ Q) for one threshold; infinite where Q is empty or too short."""
    bins = counts.shape[0]
    first = bins // 2 - jnp.where(one_sided, 0, threshold)
    size = bins // 2 + threshold - first
    levels = jnp.where(one_sided, codes, codes - 1)
    place = jnp.arange(bins) - first
    inside = (place >= 0) & (place < size)
    kept = jnp.where(inside, counts, jnp.float32(0))

    left = jnp.sum(jnp.where(place < 0, counts, jnp.float32(0)))
    right = jnp.sum(jnp.where(place >= size, counts, jnp.float32(0)))
    p = kept + jnp.where(place == 0, left, jnp.float32(0))
    p = p + jnp.where(place == size - 1, right, jnp.float32(0))

    level = (2 * place + 1) * levels // (2 * size)
    level = jnp.where(inside, level, codes)
    occupied = p > 0
    totals = jnp.zeros((codes,), jnp.float32).at[level].add(kept, mode="drop")
    among = (
        jnp.zeros((codes,), jnp.int32)
        .at[level]
        .add(occupied.astype(jnp.int32), mode="drop")
    )
    share = totals / jnp.maximum(among, 1).astype(jnp.float32)
    q = jnp.where(occupied, share.at[level].get(mode="clip"), jnp.float32(0))

    possible = (size >= levels) & jnp.any(q > 0)
    divergence = _kl(_smooth(p, inside), _smooth(q, inside), inside)
    return jnp.where(possible, divergence, jnp.float32(jnp.inf))


def _smooth(p: jax.Array, inside: jax.Array) -> jax.Array:
    """Give empty bins ε counts, taken evenly from those that are not empty."""
    empty = inside & (p == 0)
    full = jnp.maximum(jnp.sum(p > 0), 1).astype(jnp.float32)
    taken = _EPSILON * jnp.sum(empty).astype(jnp.float32) / full
    left = jnp.maximum(p - taken, jnp.float32(_EPSILON))
    return jnp.where(empty, jnp.float32(_EPSILON), left)


def _kl(p: jax.Array, q: jax.Array, inside: jax.Array) -> jax.Array:
    """Return ``Σ p log(p / q)`` of two histograms, each divided by its sum."""
    nothing = jnp.float32(0)
    p = p / jnp.sum(jnp.where(inside, p, nothing))
    q = q / jnp.sum(jnp.where(inside, q, nothing))
    return jnp.sum(jnp.where(inside, p * jnp.log(p / q), nothing))
