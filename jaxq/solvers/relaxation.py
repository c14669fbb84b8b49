"""A quantized weight as a function of what can be learned: its rounding, its range.

``ŵ = γ s · (clip(⌊w / s + v⌉ + z) − z)``, where ``v`` moves every element towards the
code above or below, multipliers ``α``, ``β`` of the two ends of every block's range set
``s`` and ``z``, and ``γ`` multiplies what the block's codes stand for. At ``v = 0, α =
β = γ = 1`` it is the start, exactly.

``α`` and ``β`` are AutoRound's: where they move, codes follow. That suits a start that
was rounded to nearest. It undoes what GPTQ arranged, where the error of one element
makes up for that of another; ``γ`` leaves codes as they are.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.blocks import spread
from jaxq.qtensor import QTensor
from jaxq.quantize import Blocking, assemble
from jaxq.scales import divide, round_scale, rounded, store_scale
from jaxq.spec import QuantSpec

Ranges = Literal["scale", "ends", "fixed"]


class Variables(NamedTuple):
    """What is learned of one weight.

    Attributes:
        rounding: ``v``, float32 of the weight's shape, in gaps between codes.
        low: ``α``, float32, one per block; None: fixed, or the format is symmetric.
        high: ``β``, float32, one per block (symmetric: of the scale); None: fixed.
        scale: ``γ``, float32, one per block; None: fixed.
    """

    rounding: jax.Array
    low: jax.Array | None
    high: jax.Array | None
    scale: jax.Array | None


def neutral(start: QTensor, ranges: Ranges = "scale") -> Variables:
    """Return the variables at which `relaxed` is ``start``.

    Args:
        start: a quantized weight.
        ranges: what is learned of a block's range: ``γ`` ("scale"), ``α`` and ``β``
            ("ends"), or nothing ("fixed"). Scales that cannot move a little are fixed
            in any case: powers of two, and scales that are quantized in turn.
    """
    spec, ones = start.spec, jnp.ones(start.scales.shape, jnp.float32)
    free = isinstance(spec.scale, str) and spec.scale != "e8m0"
    ends = ones if free and ranges == "ends" else None
    low = None if start.zeros is None else ends
    scale = ones if free and ranges == "scale" else None
    return Variables(jnp.zeros(start.shape), low, ends, scale)


def anchored(weight: jax.Array, start: QTensor) -> jax.Array:
    """Return the weight to relax: as given, but as ``start`` where the two differ.

    They differ where the nearest code is not the start's, for example where GPTQ chose
    another and ``weight`` is the original.

    Args:
        weight: float32, the shape of ``start``.
        start: codes, scales and zeros.
    """
    at = neutral(start, "fixed")
    grid = _Grid.of(start, at).spread(start)
    here = _level(_position(weight, grid, at.rounding, start.spec), start.spec)
    codes = start.code_values()
    return jnp.where(here == codes, weight, grid.values(codes))


def relaxed(anchor: jax.Array, start: QTensor, variables: Variables) -> jax.Array:
    """Return the float32 weight that `settled` would read back, differentiable.

    The rounding passes gradients as if it were not there (straight-through, Bengio et
    al. 2013), except beyond the outermost codes, where an element is clipped.

    Args:
        anchor: of `anchored`.
        start: what is learned is relative to this.
        variables: the point.
    """
    spec = start.spec
    grid = _Grid.of(start, variables)
    at = _position(anchor, grid.spread(start), variables.rounding, spec)
    lowest, highest = spec.code_range
    reach = jnp.float32(0.5) * _gap(at, spec)
    inside = (at >= lowest - reach) & (at <= highest + reach)
    level = _straight(_level(at, spec), jnp.where(inside, at, lax.stop_gradient(at)))
    values = grid.scaled(variables.scale, spec).spread(start).values(level)
    if start.offset is not None:
        values = rounded(values) + start.offset
    return values if start.input_scale is None else values * start.input_scale


def settled(anchor: jax.Array, start: QTensor, variables: Variables) -> QTensor:
    """Return the quantized weight at ``variables``: ``start`` with other numbers."""
    spec = start.spec
    grid = _Grid.of(start, variables)
    at = _position(anchor, grid.spread(start), variables.rounding, spec)
    codes = spec.number_format.encode(jnp.clip(at, *spec.code_range))
    scales = start.scales
    moved = variables.high is not None or variables.scale is not None
    if moved and isinstance(spec.scale, str):
        scales = store_scale(grid.scaled(variables.scale, spec).scale, spec.scale)
    where = Blocking(start.blocks, (start.axis % start.ndim,))
    q = assemble(codes, scales, grid.zero, spec, where, dtype=start.dtype)
    return dataclasses.replace(start, codes=q.codes, scales=q.scales, zeros=q.zeros)


class _Grid(NamedTuple):
    """Scales and zeros as they are stored, float32: one per block, or per element."""

    scale: jax.Array
    zero: jax.Array | None

    @classmethod
    def of(cls, start: QTensor, variables: Variables) -> "_Grid":
        """Return those of every block; rounding passes gradients."""
        spec, scale, high = start.spec, start.scale_values(), variables.high
        zero = None if start.zeros is None else start.zeros.astype(jnp.float32)
        if high is None:
            return cls(scale, zero)
        if zero is None or variables.low is None:
            ideal = scale * high
            return cls(_straight(round_scale(ideal, spec), ideal), zero)
        lowest, highest = spec.code_range
        below = rounded(variables.low * (zero - lowest))
        above = rounded(high * (highest - zero))
        stretch = divide(below + above, highest - lowest)
        ideal = scale * stretch
        zero = lowest + divide(below, stretch)
        nearest = jnp.clip(jnp.round(zero), lowest, highest)
        return cls(_straight(round_scale(ideal, spec), ideal), _straight(nearest, zero))

    def scaled(self, by: jax.Array | None, spec: QuantSpec) -> "_Grid":
        """Return the grid with its scales multiplied; rounding passes gradients."""
        if by is None:
            return self
        ideal = self.scale * by
        return self._replace(scale=_straight(round_scale(ideal, spec), ideal))

    def spread(self, start: QTensor) -> "_Grid":
        """Return those of every element."""
        scale = spread(self.scale, start.blocks, start.shape)
        if self.zero is None:
            return _Grid(scale, None)
        return _Grid(scale, spread(self.zero, start.blocks, start.shape))

    def values(self, codes: jax.Array) -> jax.Array:
        """Return what codes stand for."""
        return (codes if self.zero is None else codes - self.zero) * self.scale


def _position(
    weight: jax.Array, grid: _Grid, rounding: jax.Array, spec: QuantSpec
) -> jax.Array:
    """Return where elements lie in code units, not clipped; with zeros, rounded."""
    at = divide(weight, jnp.where(grid.scale == 0, jnp.float32(1), grid.scale))
    at = at + rounded(rounding * _gap(at, spec))
    return at if grid.zero is None else _straight(jnp.round(at), at) + grid.zero


def _level(at: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the nearest number of the format within the spec's code range."""
    fmt = spec.number_format
    return fmt.decode(fmt.encode(jnp.clip(at, *spec.code_range)))


def _gap(at: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the distance between the two numbers of the format around ``at``."""
    fmt = spec.number_format
    if fmt.is_integer:
        return jnp.float32(1)
    with jax.ensure_compile_time_eval():
        numbers = np.asarray(fmt.decode(jnp.arange(2**fmt.bits, dtype=jnp.uint8)))
    numbers = np.unique(numbers[np.isfinite(numbers)])
    cell = jnp.searchsorted(jnp.asarray(numbers[1:-1]), at, side="right")
    return jnp.asarray(np.diff(numbers))[cell]


def _straight(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """Return ``hard``, exactly, with the gradient of ``soft``."""
    return lax.stop_gradient(hard) + (soft - lax.stop_gradient(soft))
