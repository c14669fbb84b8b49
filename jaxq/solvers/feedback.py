"""Round rows one after the other, each with the errors of the others fed back to it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.scales import divide, to_code_units
from jaxq.spec import QuantSpec


class Grid(NamedTuple):
    """Scales and zero points, one row per row group: ``float32[R, N]``."""

    scale: jax.Array
    zero: jax.Array | None

    def row(self, group: jax.Array) -> "Grid":
        """Return the scales and zero points of one row group, ``[N]``."""
        return jax.tree.map(lambda x: _row(x, group), self)


class Rounded(NamedTuple):
    """How far the rounding of a matrix has come.

    Attributes:
        codes: ``uint8[K', N]``.
        error: ``float32[K', N]``, ``w − q``; zero where nothing is rounded yet.
        target: ``float32[K', N]``, what was rounded to the codes.
        grid: scales and zero points.
        loss: ``float32[N]``, the sum of ``(target − q)² M_kk²`` over rows.
    """

    codes: jax.Array
    error: jax.Array
    target: jax.Array
    grid: Grid
    loss: jax.Array


class Problem(NamedTuple):
    """What is rounded, and by which matrices errors are fed back.

    Attributes:
        weight: ``float32[K', N]``.
        groups: ``int32[K']``, the row group of every row.
        matrix: ``float32[K', K']``, ``M``.
        drift: ``float32[K', K']``, strictly lower triangular, or None: by it targets
            (not errors) of earlier rows are fed back, over ``M_kk`` likewise (GPTAQ).
    """

    weight: jax.Array
    groups: jax.Array
    matrix: jax.Array
    drift: jax.Array | None = None


# (a row group's updated rows [G, N], the group, the grid so far) -> the grid
Fit = Callable[[jax.Array, jax.Array, Grid], Grid]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over the rows: ``q_k = round(w_k + Σ_{j≠k} M_kj (w_j − q_j) / M_kk)``.

    With ``M`` the triangular factor of the Hessian (``MᵀM = H``) this is GPTQ: only
    errors of earlier rows are fed back, and ``Σ (target − q)² M_kk² = tr(ΔᵀHΔ)``. It is
    GPTQ without ``H⁻¹``. There, every row's error is spread over all later rows by
    ``U = M⁻ᵀ``; what a row has got by its turn sums up to ``Σ_{j<k} M_kj Δ_j / M_kk``
    (Chee et al. 2023, QuIP, theorem 6: GPTQ is LDLQ). With ``M = H`` it is coordinate
    descent on ``tr(ΔᵀHΔ)`` (Behdin et al. 2023, QuantEase).

    Rows are taken in blocks, and blocks in units, for speed alone: errors of rows
    outside are fed back by products of matrices.

    Attributes:
        spec: format of the codes.
        block: rows per block; divides the number of rows.
        unit: rows per unit; divides the block. A row group when there is a ``fit``.
        triangular: whether ``M`` is lower triangular: blocks to come are not read.
        fit: chooses scales when a row group begins; None: they are given.
    """

    spec: QuantSpec
    block: int
    unit: int
    triangular: bool = True
    fit: Fit | None = None

    def __call__(self, problem: Problem, state: Rounded) -> Rounded:
        """Return the state after one pass over all rows."""
        count = problem.weight.shape[0] // self.block

        def step(b: jax.Array, state: Rounded) -> Rounded:
            fed = self._other_blocks(problem.matrix, state.error, b)
            if problem.drift is not None:
                fed = fed + self._other_blocks(problem.drift, state.target, b)
            start = b * self.block
            done = self._block(
                _cut_problem(problem, start, self.block),
                _cut(state, start, self.block),
                fed,
            )
            return _paste(state, done, start)

        return lax.fori_loop(0, count, step, state)

    def _other_blocks(self, matrix: jax.Array, x: jax.Array, b: jax.Array) -> jax.Array:
        """Return the product of a block of rows with ``x``, its own rows left out."""
        size = self.block
        count = b if self.triangular else matrix.shape[0] // size - 1

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            other = i + (i >= b).astype(i.dtype)
            tile = lax.dynamic_slice(matrix, (b * size, other * size), (size, size))
            return total + _dot(tile, _rows(x, other * size, size))

        return lax.fori_loop(0, count, add, jnp.zeros((size, x.shape[1]), jnp.float32))

    def _block(self, problem: Problem, state: Rounded, fed: jax.Array) -> Rounded:
        """Round one block; ``fed`` is what other blocks feed back, ``[B, N]``."""
        size = self.unit
        columns = jnp.arange(self.block) // size

        def step(u: jax.Array, state: Rounded) -> Rounded:
            start = u * size
            outside = (columns != u).astype(jnp.float32)
            here = _rows(fed, start, size)
            here = here + _dot(
                _rows(problem.matrix, start, size) * outside, state.error
            )
            if problem.drift is not None:
                tile = _rows(problem.drift, start, size) * outside
                here = here + _dot(tile, state.target)
            inside = _cut_problem(problem, start, size)
            done = self._unit(inside, _cut(state, start, size), here)
            return _paste(state, done, start)

        return lax.fori_loop(0, self.block // size, step, state)

    def _unit(self, problem: Problem, state: Rounded, fed: jax.Array) -> Rounded:
        """Round one unit, row by row; ``fed`` is what other units feed back."""
        diagonal = jnp.diagonal(problem.matrix)
        if self.fit is not None:
            # what GPTQ's updated weights are before the first row of the group
            updated = problem.weight + lax.linalg.triangular_solve(
                problem.matrix, fed, left_side=True, lower=True
            )
            grid = self.fit(updated, problem.groups[0], state.grid)
            state = state._replace(grid=grid)
        others = problem.matrix * (1 - jnp.eye(self.unit, dtype=jnp.float32))

        def step(i: jax.Array, state: Rounded) -> Rounded:
            got = _row(fed, i) + _dot(_row(others, i), state.error)
            if problem.drift is not None:
                got = got + _dot(_row(problem.drift, i), state.target)
            w, weight = _row(problem.weight, i), diagonal[i]
            target = w + divide(got, weight)
            code, value = nearest(target, state.grid.row(problem.groups[i]), self.spec)
            loss = state.loss + ((target - value) * weight) ** 2
            row = Rounded(code[None], (w - value)[None], target[None], state.grid, loss)
            return _paste(state, row, i)

        return lax.fori_loop(0, self.unit, step, state)


def nearest(x: jax.Array, grid: Grid, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Return the nearest codes to ``x``, uint8, and the numbers they stand for."""
    fmt = spec.number_format
    codes = fmt.encode(to_code_units(x, grid.scale, grid.zero, spec))
    values = fmt.decode(codes)
    if grid.zero is not None:
        values = values - grid.zero
    return codes, values * grid.scale


def start(problem: Problem, grid: Grid) -> Rounded:
    """Return the state before anything is rounded."""
    shape = problem.weight.shape
    return Rounded(
        jnp.zeros(shape, jnp.uint8),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        grid,
        jnp.zeros(shape[1], jnp.float32),
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product in float32 proper, also where the default is narrower."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _row(x: jax.Array, i: jax.Array) -> jax.Array:
    """Return row ``i``."""
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Return ``size`` rows from ``start``."""
    return lax.dynamic_slice_in_dim(x, start, size)


def _cut_problem(problem: Problem, start: jax.Array, size: int) -> Problem:
    """Return the part of the problem inside ``size`` rows from ``start``."""

    def square(x: jax.Array) -> jax.Array:
        # a block's matrices are cut to its rows and columns alike
        return lax.dynamic_slice(x, (start, start), (size, size))

    return Problem(
        _rows(problem.weight, start, size),
        _rows(problem.groups, start, size),
        square(problem.matrix),
        None if problem.drift is None else square(problem.drift),
    )


def _cut(state: Rounded, start: jax.Array, size: int) -> Rounded:
    """Return the state of ``size`` rows from ``start``."""
    codes, error, target = jax.tree.map(
        lambda x: _rows(x, start, size), (state.codes, state.error, state.target)
    )
    return state._replace(codes=codes, error=error, target=target)


def _paste(state: Rounded, part: Rounded, start: jax.Array) -> Rounded:
    """Return ``state`` with the rows from ``start`` replaced."""

    def one(x: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, rows, start, 0)

    codes, error, target = jax.tree.map(
        one,
        (state.codes, state.error, state.target),
        (part.codes, part.error, part.target),
    )
    return Rounded(codes, error, target, part.grid, part.loss)
