"""Round rows one after the other, each with the errors of the others fed back to it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.scales import divide, to_code_units
from jaxq.spec import QuantSpec

# Rows whose errors are spread by vectors, not by products of matrices.
LEAST_SPAN = 32


class Grid(NamedTuple):
    """Scales and zero points, one row per row group: ``float32[R, N]``."""

    scale: jax.Array
    zero: jax.Array | None

    def row(self, group: jax.Array) -> "Grid":
        """Return the scales and zero points of one row group, ``[N]``."""
        return jax.tree.map(lambda x: _row(x, group), self)

    def with_row(self, group: jax.Array, row: "Grid") -> "Grid":
        """Return the grid with those of one row group replaced."""
        write = lambda x, r: lax.dynamic_update_index_in_dim(x, r, group, 0)
        return jax.tree.map(write, self, row)


class Rounded(NamedTuple):
    """How far the rounding of a matrix has come.

    Attributes:
        error: ``float32[K', N]``, ``w − q``; ``w`` itself where nothing is rounded yet.
        codes: ``uint8[K', N]``.
        target: ``float32[K', N]``, what was rounded to the codes; None: not kept.
        grid: scales and zero points.
    """

    error: jax.Array
    codes: jax.Array
    target: jax.Array | None
    grid: Grid

    def map_rows(self, change: Callable[..., jax.Array], *others: "Rounded") -> Self:
        """Return the state with ``change`` applied to every array of rows."""
        pick = lambda s: (s.error, s.codes, s.target)
        rows = jax.tree.map(change, pick(self), *map(pick, others))
        return self._replace(error=rows[0], codes=rows[1], target=rows[2])


class Problem(NamedTuple):
    """By which matrices errors are fed back.

    Attributes:
        matrix: ``float32[K', K']``, ``M``.
        ridge: ``float32[K']``, to be added to the diagonal of ``M``, or None.
        groups: ``int32[K']``, the row group of every row.
        drift: ``float32[K', K']``, strictly lower triangular, or None: by it targets
            (not errors) of earlier rows are fed back, over ``M_kk`` likewise (GPTAQ).
    """

    matrix: jax.Array
    groups: jax.Array
    ridge: jax.Array | None = None
    drift: jax.Array | None = None

    def square(self) -> jax.Array:
        """Return ``M`` with the ridge on its diagonal."""
        return self.matrix if self.ridge is None else self.matrix + jnp.diag(self.ridge)


# (a row group's part of the problem, its state, what other rows feed back) -> its state
Begin = Callable[[Problem, Rounded, jax.Array], Rounded]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over the rows: ``q_k = round(w_k + Σ_{j≠k} M_kj (w_j − q_j) / M_kk)``.

    With ``M`` the triangular factor of the Hessian (``MᵀM = H``) this is GPTQ: only
    errors of earlier rows are fed back, and ``Σ (target − q)² M_kk² = tr(ΔᵀHΔ)``. It is
    GPTQ without ``H⁻¹``. There, every row's error is spread over all later rows by
    ``U = M⁻ᵀ``; what a row has got by its turn sums up to ``Σ_{j<k} M_kj Δ_j / M_kk``
    (Chee et al. 2023, QuIP, theorem 6: GPTQ is LDLQ). With ``M = H`` it is coordinate
    descent on ``tr(ΔᵀHΔ)`` (Behdin et al. 2023, QuantEase).

    Rows are taken in spans inside spans, for speed alone: what a span gets from rows
    outside is a product of matrices.

    Attributes:
        spec: format of the codes.
        spans: rows per span, each a multiple of the next; the first divides ``K'``.
        first: whether ``M`` is lower triangular and no row is rounded yet.
        group: rows per row group, one of ``spans``; used with ``begin``.
        begin: called with every row group before its rows are rounded, or None.
    """

    spec: QuantSpec
    spans: tuple[int, ...]
    first: bool = True
    group: int = 0
    begin: Begin | None = None

    def __call__(self, problem: Problem, state: Rounded) -> Rounded:
        """Return the state after one pass over all rows."""
        size = self.spans[0]
        count = state.error.shape[0] // size

        def step(b: jax.Array, state: Rounded) -> Rounded:
            fed = self._other_spans(problem.matrix, state.error, b)
            if problem.drift is not None:
                assert state.target is not None
                fed = fed + self._other_spans(problem.drift, state.target, b)
            start = b * size
            part = _cut(state, start, size)
            part = self._span(_cut_problem(problem, start, size), part, fed, self.spans)
            return _paste(state, part, start)

        return lax.fori_loop(0, count, step, state)

    def _other_spans(self, matrix: jax.Array, x: jax.Array, b: jax.Array) -> jax.Array:
        """Return the product of a span's rows with ``x``, its own rows left out."""
        size = self.spans[0]
        count = b if self.first else matrix.shape[0] // size - 1

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            other = i + (i >= b).astype(i.dtype)
            tile = lax.dynamic_slice(matrix, (b * size, other * size), (size, size))
            return total + _dot(tile, _rows(x, other * size, size))

        return lax.fori_loop(0, count, add, jnp.zeros((size, x.shape[1]), jnp.float32))

    def _span(
        self, problem: Problem, state: Rounded, fed: jax.Array, spans: tuple[int, ...]
    ) -> Rounded:
        """Round one span of ``spans[0]`` rows; ``fed`` is what other rows feed back."""
        if self.begin is not None and spans[0] == self.group:
            state = self.begin(problem, state, fed)
        if len(spans) == 1:
            return self._one_by_one(problem, state, fed)
        size = spans[1]
        columns = jnp.arange(spans[0]) // size

        def step(u: jax.Array, state: Rounded) -> Rounded:
            start = u * size
            outside = (columns != u).astype(jnp.float32)
            here = _rows(fed, start, size)
            here += _dot(_rows(problem.matrix, start, size) * outside, state.error)
            if problem.drift is not None:
                here += _targets(_rows(problem.drift, start, size) * outside, state)
            inside = _cut_problem(problem, start, size)
            part = self._span(inside, _cut(state, start, size), here, spans[1:])
            return _paste(state, part, start)

        return lax.fori_loop(0, spans[0] // size, step, state)

    def _one_by_one(self, problem: Problem, state: Rounded, fed: jax.Array) -> Rounded:
        """Round the rows of the innermost span."""
        count = state.error.shape[0]
        diagonal = jnp.diagonal(problem.square())
        others = problem.matrix * (1 - jnp.eye(count, dtype=jnp.float32))

        def step(i: jax.Array, state: Rounded) -> Rounded:
            got = _row(fed, i) + _dot(_row(others, i), state.error)
            if problem.drift is not None:
                got = got + _targets(_row(problem.drift, i), state)
            grid, w = state.grid.row(problem.groups[i]), _row(state.error, i)
            if not self.first:
                w = w + values(_row(state.codes, i), grid, self.spec)
            target = w + divide(got, diagonal[i])
            codes = nearest(target, grid, self.spec)
            part = Rounded(
                (w - values(codes, grid, self.spec))[None],
                codes[None],
                None if state.target is None else target[None],
                state.grid,
            )
            return _paste(state, part, i)

        return lax.fori_loop(0, count, step, state)


def spans(block: int, group: int = 0) -> tuple[int, ...]:
    """Return the sizes of spans for blocks of about ``block`` rows.

    Args:
        block: rows per outermost span.
        group: when not 0, one of the sizes: the outermost is a multiple of it.

    Example:
        >>> spans(128), spans(128, 16), spans(128, 64), spans(100, 48), spans(8, 512)
        ((128, 32), (128, 16), (128, 64, 32), (96, 48, 24), (512, 128, 32))
    """
    if not group:
        return (block, *_inside(block))
    outer = max(block // group, 1) * group
    return (outer,) * (outer != group) + (group, *_inside(group))


def _inside(size: int) -> tuple[int, ...]:
    """Return sizes of spans inside one of ``size`` rows, down to a few rows."""
    out = []
    for most in (128, LEAST_SPAN):
        if size > most:
            size = max(n for n in range(1, most + 1) if size % n == 0)
            out.append(size)
    return tuple(n for n in out if n > 1)


def nearest(x: jax.Array, grid: Grid, spec: QuantSpec) -> jax.Array:
    """Return the nearest codes to ``x``, uint8."""
    return spec.number_format.encode(to_code_units(x, grid.scale, grid.zero, spec))


def values(codes: jax.Array, grid: Grid, spec: QuantSpec) -> jax.Array:
    """Return the numbers that codes stand for, float32."""
    return units(codes, grid, spec) * grid.scale


def units(codes: jax.Array, grid: Grid, spec: QuantSpec) -> jax.Array:
    """Return the numbers that codes stand for, over the scale."""
    decoded = spec.number_format.decode(codes)
    return decoded if grid.zero is None else decoded - grid.zero


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product in float32 proper, also where the default is narrower."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _targets(drift: jax.Array, state: Rounded) -> jax.Array:
    """Return what earlier targets feed back."""
    assert state.target is not None
    return _dot(drift, state.target)


def _row(x: jax.Array, i: jax.Array) -> jax.Array:
    """Return row ``i``."""
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Return ``size`` rows from ``start``."""
    return lax.dynamic_slice_in_dim(x, start, size)


def _cut_problem(problem: Problem, start: jax.Array, size: int) -> Problem:
    """Return the part of the problem inside ``size`` rows from ``start``."""

    def rows(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else _rows(x, start, size)

    def square(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice(x, (start, start), (size, size))

    return Problem(
        square(problem.matrix),
        _rows(problem.groups, start, size),
        rows(problem.ridge),
        None if problem.drift is None else square(problem.drift),
    )


def _cut(state: Rounded, start: jax.Array, size: int) -> Rounded:
    """Return the state of ``size`` rows from ``start``."""
    return state.map_rows(lambda x: _rows(x, start, size))


def _paste(state: Rounded, part: Rounded, start: jax.Array) -> Rounded:
    """Return ``state`` with the rows from ``start`` replaced."""
    write = lambda x, rows: lax.dynamic_update_slice_in_dim(x, rows, start, 0)
    return state.map_rows(write, part)._replace(grid=part.grid)
