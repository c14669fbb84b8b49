"""ACIQ: the analytic clip of a Gaussian or a Laplace distribution."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.base import (
    Bounds,
    Observer,
    honest,
    refuse_other_than_integers,
    summary,
)
from jaxq.observers.minmax import see_range
from jaxq.observers.rows import Rows
from jaxq.spec import QuantSpec

# The minimum over α of 2[(α²+σ²)Q(α/σ) − ασφ(α/σ)] + α²/(3·4^b), as α/σ, for b = 1 … 9.
GAUSSIAN_CLIP = (
    1.2399053,
    1.7106352,
    2.1515927,
    2.5591365,
    2.9362006,
    3.2869142,
    3.6151142,
    3.9240355,
    4.2163298,
)
# The minimum over α of 2B²e^(−α/B) + α²/(3·4^b), as α/B.
LAPLACE_CLIP = (
    1.8628169,
    2.8306830,
    3.8972295,
    5.0286401,
    6.2047663,
    7.4131262,
    8.6456200,
    9.8967598,
    11.1626850,
)
# The likelihoods of the two fits are equal at B/σ = √(π/2e).
_EQUAL_FIT = math.sqrt(math.pi / (2 * math.e))


class Moments(NamedTuple):
    """The moments about zero of an activation, and how many tokens were seen.

    Attributes:
        magnitude: ``Σ |x|``, float32.
        square: ``Σ x²``, float32.
        nonzero: how many elements are not exactly zero, float32.
        low: smallest value, float32; +inf of nothing.
        high: largest value, float32; −inf of nothing.
        tokens: rows seen, int32.
    """

    magnitude: jax.Array
    square: jax.Array
    nonzero: jax.Array
    low: jax.Array
    high: jax.Array
    tokens: jax.Array

    @property
    def deviation(self) -> jax.Array:
        """The standard deviation about zero, σ, of the elements that are not zero."""
        return jnp.sqrt(self.square / jnp.maximum(self.nonzero, 1))

    @property
    def breadth(self) -> jax.Array:
        """The mean magnitude, Laplace's B, of the elements that are not zero."""
        return self.magnitude / jnp.maximum(self.nonzero, 1)

    @property
    def is_laplace(self) -> jax.Array:
        """Whether the Laplace distribution of that B is likelier than the Gaussian.

        The mean log-likelihoods are ``−log 2B − 1`` and ``−½ log 2πσ² − ½``: Laplace
        where ``B/σ < √(π/2e) = 0.760`` (a Gaussian has 0.798, a Laplace 0.707).
        """
        return self.breadth < self.deviation * jnp.float32(_EQUAL_FIT)


def aciq() -> Observer:
    """Return the observer of the moments that ACIQ's clip is made of.

    The clip α minimizes, for ``2^b`` evenly spaced levels on [−α, α],

        Gaussian  ``2[(α² + σ²) Q(α/σ) − ασ φ(α/σ)] + α² / (3 · 4^b)``
        Laplace   ``2B² e^(−α/B) + α² / (3 · 4^b)``

    of the likelier of the two. Activations that are nowhere negative (after a ReLU) are
    half of such a distribution; unsigned or asymmetric codes then have one bit more,
    since all of them lie on [0, α]. Both families are centred on zero, and fitted to
    what is not exactly zero, which no range harms. The range is [−α, α] within the
    observed extremes (Banner et al. 2019, section 3).

    Example:
        >>> observer = aciq()
        >>> x = jax.random.normal(jax.random.key(0), (500, 80))
        >>> state = observer.update(observer.init(x), x)
        >>> low, high = observer.bounds(state, QuantSpec("int4", "tensor"))
        >>> print(f"{float(high):.1f}")
        2.6
    """

    def init(like: jax.ShapeDtypeStruct) -> Moments:
        nothing, infinite = (
            jnp.zeros((), jnp.float32),
            jnp.asarray(jnp.inf, jnp.float32),
        )
        empty = (nothing, nothing, nothing, infinite, -infinite)
        return Moments(*empty, jnp.zeros((), jnp.int32))

    def see(rows: Rows) -> Moments:
        extremes = see_range(rows)
        nonzero = jnp.sum(rows.values != 0, dtype=jnp.int32).astype(jnp.float32)
        return Moments(
            jnp.sum(jnp.abs(rows.values)),
            jnp.sum(rows.values * rows.values),
            nonzero,
            *extremes,
        )

    def merge(a: Moments, b: Moments) -> Moments:
        return Moments(
            a.magnitude + b.magnitude,
            a.square + b.square,
            a.nonzero + b.nonzero,
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
            a.tokens + b.tokens,
        )

    return summary(init, see, merge, aciq_bounds)


def aciq_bounds(state: Moments, spec: QuantSpec) -> Bounds:
    """Return the range [−α, α] within the extremes; see `aciq`.

    Raises:
        ValueError: when the codes are not evenly spaced.
    """
    refuse_other_than_integers(spec, "aciq")
    all_positive = not spec.symmetric or spec.number_format.lowest == 0
    extra = (state.low >= 0) & all_positive
    row = spec.bits - 1 + extra.astype(jnp.int32)
    gaussian = jnp.asarray(GAUSSIAN_CLIP, jnp.float32)[row] * state.deviation
    laplace = jnp.asarray(LAPLACE_CLIP, jnp.float32)[row] * state.breadth
    clip = jnp.where(state.is_laplace, laplace, gaussian)
    return honest(state, jnp.maximum(state.low, -clip), jnp.minimum(state.high, clip))
