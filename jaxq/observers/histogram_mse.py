"""The range of least squared error."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.observers.base import Bounds, Observer, honest
from jaxq.observers.histogram import Histogram, histogram
from jaxq.scales import affine, to_code_units
from jaxq.spec import QuantSpec

_PER_OCTAVE, _OCTAVES, _BETWEEN = 8, 10, 17
_GOLDEN = (5**0.5 - 1) / 2


def histogram_mse(exponent: float = 2.0, bins: int = 4096) -> Observer:
    """Return the observer that finds the range of least error.

    ``argmin_(p, r) Σ n_i |x_i − x̂_i(p · low, r · high)|^exponent`` over the histogram:
    ``p = r`` for symmetric codes, each by itself for asymmetric ones. Factors are tried
    from 1 down to 2^-10 in steps of 9 %, then of 1 % around the best. Rounding is that
    of the spec, so every format has its range.

    Args:
        exponent: of the error; 2 is the mean squared error, 2.4 GPTQ's.
        bins: of the histogram, a power of two.

    Raises:
        ValueError: when ``exponent`` is not positive, or ``bins`` is out of range.

    Example:
        >>> observer = histogram_mse()
        >>> x = jax.random.normal(jax.random.key(0), (500, 80))
        >>> state = observer.update(observer.init(x), x)
        >>> low, high = observer.bounds(state, QuantSpec("int4", "tensor"))
        >>> bool(max(-low, high) < 2.6)  # the best clip of N(0, 1) is 2.47
        True
    """
    if exponent <= 0:
        raise ValueError(
            f"exponent={exponent} must be positive; 2 is the squared error"
        )
    return histogram(bins, functools.partial(mse_bounds, exponent=float(exponent)))


@functools.partial(jax.jit, static_argnames=("spec", "exponent"))
def mse_bounds(state: Histogram, spec: QuantSpec, exponent: float = 2.0) -> Bounds:
    """Return the range of least error; see `histogram_mse`."""
    values = _representatives(state)

    def loss(p: jax.Array, r: jax.Array) -> jax.Array:
        scale, zero = affine(state.low * p, state.high * r, spec)
        codes = to_code_units(values, scale, zero, spec)
        read = spec.number_format.decode(spec.number_format.encode(codes))
        read = (read if zero is None else read - zero) * scale
        return jnp.sum(state.counts * jnp.abs(values - read) ** exponent)

    p = r = _search(lambda p: loss(p, p))
    if not spec.symmetric:
        for _ in range(2):
            r = _search(functools.partial(loss, p))
            p = _search(functools.partial(lambda r, p: loss(p, r), r))
    return honest(state, state.low * p, state.high * r)


def _representatives(state: Histogram) -> jax.Array:
    """Return one value per bin, ``float32[bins]``, spread evenly within the bins.

    Their centres would lie at the same place between two codes again and again where
    bins are wider than codes; multiples of the golden ratio visit all places.
    """
    half = state.counts.shape[0] // 2
    bin_ = np.arange(half)
    inside = ((bin_ + 0.5) * _GOLDEN) % 1
    right = bin_ + inside
    units = np.concatenate([-right[::-1], right]).astype(np.float32)
    return jnp.clip(jnp.asarray(units) * state.bin_width, state.low, state.high)


def _search(loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return the factor in (0, 1] of least loss: over octaves, then around the best."""
    coarse = np.exp2(-np.arange(_PER_OCTAVE * _OCTAVES + 1) / _PER_OCTAVE)
    step = 2 ** (1 / _PER_OCTAVE)
    best = _least(loss, jnp.asarray(coarse, jnp.float32))
    around = jnp.linspace(1 / step, step, _BETWEEN, dtype=jnp.float32)
    return _least(loss, jnp.minimum(best * around, jnp.float32(1)))


def _least(loss: Callable[[jax.Array], jax.Array], factors: jax.Array) -> jax.Array:
    """Return the first factor of least loss."""
    return factors[jnp.argmin(lax.map(loss, factors))]
