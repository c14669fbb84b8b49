"""BCQ: signs and their scales, by alternating least squares."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.binary import interleaved
from jaxq.quantize import Axes, assemble
from jaxq.scales import load_scale, store_scale
from jaxq.solvers.base import Solved, Statistics
from jaxq.solvers.hessian import curvature
from jaxq.solvers.matrix import MatrixView
from jaxq.solvers.stacking import solve_each
from jaxq.spec import QuantSpec

RIDGE = 1e-6  # of the rows: signs of two planes may be the same


class Coding(NamedTuple):
    """Scales and offset of one group of rows, per column.

    Attributes:
        scales: ``[q, N]``, ascending, none below 0.
        offset: ``[N]``; zeros where the spec has none.
    """

    scales: jax.Array
    offset: jax.Array


def bcq(
    weight: jax.Array,
    statistics: Statistics | None,
    spec: QuantSpec,
    *,
    axis: Axes = None,
    stacked: Sequence[int] = (),
    rounds: int = 15,
    importance: bool = False,
) -> Solved:
    """Choose signs and scales with the least squares error of every group.

    ``min Σ_k h_k (w_k − Σ_i α_i b_ki − z)²`` by turns: for given signs the scales (and
    the offset) are a least squares problem; for given scales every weight takes the
    nearest of the 2^q numbers. The error never grows. It starts twice, from greedy
    signs (``b = sign(r), α = mean |r|, r ← r − α b``) and from an even grid, and each
    group of a column keeps the better end.

    Args:
        weight: float, any shape.
        statistics: ``gram``, for ``importance``; otherwise unused.
        spec: unsigned integers in groups or per channel; taken as binary-coded. With an
            offset per group unless ``symmetric``.
        axis: the contracted axes.
        stacked: axes that enumerate independent weights.
        rounds: of least squares.
        importance: weigh errors by the diagonal of the Gram matrix.

    Raises:
        ValueError: when ``rounds`` is negative, the spec cannot be binary-coded, or
            there is no Gram matrix to weigh by.

    Example:
        >>> import jax
        >>> w = jax.random.normal(jax.random.key(0), (256, 8))
        >>> q = bcq(w, None, QuantSpec("uint2", 64)).weight
        >>> float(jnp.mean((q.dequantize() - w) ** 2)) < 0.13
        True

    Source: Xu et al. 2018, Alternating Multi-bit Quantization (arXiv 1802.00150);
    Park et al. 2022, LUT-GEMM (arXiv 2206.09557).
    """
    if type(rounds) is not int or rounds < 0:
        raise ValueError(f"rounds={rounds!r} must be an integer >= 0; 15 is usual")
    if importance and (statistics is None or statistics.gram is None):
        raise ValueError(
            "importance=True needs the Gram matrix of the activations: calibrate "
            "first, or leave it out"
        )
    spec = dataclasses.replace(spec, binary=True)
    solve = functools.partial(_solve_one, spec, rounds, importance)
    if statistics is None or not importance:
        lengths = [weight.shape[a] for a in stacked]
        nothing = jnp.zeros((*lengths, 0), jnp.float32)
        seen = Statistics(nothing, nothing)
    else:
        seen = Statistics(statistics.gram, statistics.tokens)
    return solve_each(solve, weight, seen, spec, axis=axis, stacked=stacked)


def optional_statistics(options: dict[str, Any]) -> tuple[str, ...]:
    """Return the statistics that `bcq` needs under these options."""
    return ("gram", "tokens") if options.get("importance") else ()


def _solve_one(
    spec: QuantSpec,
    rounds: int,
    importance: bool,
    weight: jax.Array,
    statistics: Statistics,
    contracting: tuple[int, ...],
) -> Solved:
    """Return one weight solved, a group after the other."""
    view = MatrixView.of(weight.shape, spec, contracting)
    share = jnp.ones(view.rows, jnp.float32)
    if importance:
        view.check_square("gram", statistics.gram)
        of = curvature(statistics.gram)
        share = jnp.where(of.usable, of.diagonal / jnp.mean(of.diagonal), share)
    matrix = view.to_matrix(weight.astype(jnp.float32))
    # ragged groups end in rows of weight 0 that count for nothing
    groups = view.to_groups(matrix), view.to_groups(share)
    solve = functools.partial(_solve_group, spec, rounds)
    coding, codes = lax.map(lambda pair: solve(*pair), groups)
    rows = jnp.zeros((view.rows, view.columns), jnp.uint8)
    rows = rows.at[view.slots].set(codes, mode="drop")
    planes = [
        view.groups_to_grid(coding.scales[:, i].reshape(-1, *view.free))
        for i in range(spec.bits)
    ]
    scales = interleaved(jnp.stack(planes), view.where.contracting[-1])
    offset = view.groups_to_grid(coding.offset.reshape(-1, *view.free))
    q = assemble(
        view.from_matrix(rows),
        store_scale(scales, str(spec.scale)),
        None,
        spec,
        view.where,
        dtype=weight.dtype,
        offset=None if spec.symmetric else offset,
    )
    return Solved(q, {})


def _solve_group(
    spec: QuantSpec, rounds: int, x: jax.Array, share: jax.Array
) -> tuple[Coding, jax.Array]:
    """Return the better coding of a group ``[G, N]``, and its codes, uint8."""

    def refined(start: Coding) -> tuple[Coding, jax.Array, jax.Array]:
        def turn(best: Any, _: None) -> tuple[Any, None]:
            coding, codes, loss = best
            now = _rounded(_least_squares(x, share, codes, coding, spec), spec)
            again = _nearest(x, now, spec.bits)
            better = (error := _loss(x, share, now, again)) < loss
            keep = lambda new, old: jnp.where(better, new, old)
            return jax.tree.map(keep, (now, again, error), best), None

        start = _rounded(start, spec)
        codes = _nearest(x, start, spec.bits)
        first = start, codes, _loss(x, share, start, codes)
        return lax.scan(turn, first, None, length=rounds)[0]

    ends = [refined(start(x, share, spec.bits)) for start in (_greedy, _even)]
    better = ends[1][2] < ends[0][2]
    coding, codes, _ = jax.tree.map(
        lambda a, b: jnp.where(better, b, a), ends[0], ends[1]
    )
    return coding, codes


def _greedy(x: jax.Array, share: jax.Array, bits: int) -> Coding:
    """Return scales chosen one after the other, each for what the last one left."""
    rest, scales, total = x, [], jnp.sum(share)
    for _ in range(bits):
        scale = jnp.sum(jnp.abs(rest) * share[:, None], axis=0) / total
        rest = rest - jnp.where(rest >= 0, scale, -scale)
        scales.append(scale)
    return Coding(jnp.sort(jnp.stack(scales), axis=0), jnp.zeros_like(scales[0]))


def _even(x: jax.Array, share: jax.Array, bits: int) -> Coding:
    """Return scales that are powers of two: an even grid over the range."""
    counts = share[:, None] > 0
    top = jnp.max(jnp.where(counts, x, -jnp.inf), axis=0, initial=-jnp.inf)
    low = jnp.min(jnp.where(counts, x, jnp.inf), axis=0, initial=jnp.inf)
    largest = jnp.maximum(jnp.abs(top), jnp.abs(low))
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.float32(0))
    powers = 2.0 ** jnp.arange(bits, dtype=jnp.float32)
    scales = powers[:, None] * largest / jnp.float32(2**bits - 1)
    return Coding(scales, jnp.zeros_like(largest))


def _signs(codes: jax.Array, bits: int) -> jax.Array:
    """Return the signs of codes, float32 ``[q, ...]``."""
    places = jnp.arange(bits, dtype=jnp.uint8).reshape(-1, *(1,) * codes.ndim)
    return ((codes >> places) & jnp.uint8(1)).astype(jnp.float32) * 2 - 1


def _least_squares(
    x: jax.Array, share: jax.Array, codes: jax.Array, coding: Coding, spec: QuantSpec
) -> Coding:
    """Return the scales and offset that fit the signs best, the scales ascending.

    What the normal equations of a column do not settle stays as it was: they are solved
    for the change.
    """
    design = _signs(codes, spec.bits)
    if not spec.symmetric:
        design = jnp.concatenate([design, jnp.ones_like(design[:1])])
    weighed = design * share[:, None]
    rest = x - _values(coding, codes)
    highest = lax.Precision.HIGHEST
    normal = jnp.einsum("ikn,jkn->nij", weighed, design, precision=highest)
    right = jnp.einsum("ikn,kn->ni", weighed, rest, precision=highest)
    ridge = RIDGE * jnp.maximum(jnp.sum(share), jnp.float32(1e-20))
    normal = normal + ridge * jnp.eye(len(design), dtype=jnp.float32)
    change = jnp.linalg.solve(normal, right[..., None])[..., 0].T
    scales = jnp.sort(jnp.abs(coding.scales + change[: spec.bits]), axis=0)
    offset = coding.offset if spec.symmetric else coding.offset + change[-1]
    return Coding(scales, offset)


def _rounded(coding: Coding, spec: QuantSpec) -> Coding:
    """Return the coding with its scales as they will read back."""
    kind = str(spec.scale)
    return Coding(load_scale(store_scale(coding.scales, kind), kind), coding.offset)


def _values(coding: Coding, codes: jax.Array) -> jax.Array:
    """Return what codes ``[G, N]`` stand for."""
    bits = len(coding.scales)
    return jnp.sum(_signs(codes, bits) * coding.scales[:, None], 0) + coding.offset


def _nearest(x: jax.Array, coding: Coding, bits: int) -> jax.Array:
    """Return the code of the nearest of the 2^q numbers, uint8 ``[G, N]``."""

    def attempt(
        best: tuple[jax.Array, jax.Array], code: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        level = _values(coding, code[None, None])
        distance = jnp.abs(x - level)
        nearer = distance < best[0]
        return (
            jnp.where(nearer, distance, best[0]),
            jnp.where(nearer, code, best[1]),
        ), None

    start = jnp.full(x.shape, jnp.inf, jnp.float32), jnp.zeros(x.shape, jnp.uint8)
    every = jnp.arange(2**bits, dtype=jnp.uint8)
    return lax.scan(attempt, start, every)[0][1]


def _loss(
    x: jax.Array, share: jax.Array, coding: Coding, codes: jax.Array
) -> jax.Array:
    """Return the weighed squared error per column."""
    return jnp.sum(share[:, None] * (x - _values(coding, codes)) ** 2, axis=0)
