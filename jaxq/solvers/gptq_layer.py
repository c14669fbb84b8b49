"""GPTQ of one weight: from a Gram matrix to codes and scales."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.quantize import assemble, settle_scale
from jaxq.scales import store_scale
from jaxq.solvers.base import Solved, Statistics
from jaxq.solvers.drift import Drift
from jaxq.solvers.feedback import Begin, Grid, Problem, Rounded, Sweep, spans
from jaxq.solvers.gptq_settings import Settings
from jaxq.solvers.hessian import Curvature, Factor, curvature, factor
from jaxq.solvers.matrix import MatrixView, spread_columns
from jaxq.solvers.order import ORDERS, Order, by_slots, natural
from jaxq.solvers.refine import refining
from jaxq.solvers.scale_search import Groups, search_scales
from jaxq.spec import QuantSpec

HIGHEST = lax.Precision.HIGHEST

# A diagonal to divide by where a row has nothing to do with any other.
TINY = 1e-30


class Prepared(NamedTuple):
    """What is known of a layer before a row is rounded.

    Attributes:
        weight: ``float32[K, N]``, what is to be rounded.
        gram: ``float32[K, K]``.
        curvature: its diagonal.
        order: of rounding.
        factor: the triangular matrix in that order.
    """

    weight: jax.Array
    gram: jax.Array
    curvature: Curvature
    order: Order
    factor: Factor


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight, how it is quantized, and the options: all that is static."""

    view: MatrixView
    spec: QuantSpec
    settings: Settings

    def solve(self, weight: jax.Array, statistics: Statistics) -> Solved:
        """Return the solved weight; see `jaxq.solvers.gptq`."""
        matrix = self.view.to_matrix(weight.astype(jnp.float32))
        of = curvature(statistics.gram)
        order = self._order(of.diagonal)
        f = factor(statistics.gram, of, order, self.settings.damping)
        fed = None
        if statistics.drift is not None:
            drift = Drift(statistics.drift / of.unit, self.settings.drift)
            if self.settings.correction == "target":
                matrix = drift.target(matrix, f, order)
            else:
                fed = drift.feedback(f, order)
        ready = Prepared(matrix, statistics.gram, of, order, f)
        stored, grid = self._grid(ready)
        state = self._round(ready, grid, fed)
        if self.settings.sweeps:
            state = self._refine(ready, state)
        return self._assemble(weight, f, state, stored)

    @property
    def _dynamic(self) -> bool:
        """Whether scales are chosen as groups begin (the first begins as it was)."""
        return not self.settings.static_groups and len(self.view.slots) > 1

    @property
    def _spans(self) -> tuple[int, ...]:
        """The sizes of spans of rows that are rounded."""
        if self._dynamic:
            return spans(self.settings.block_size, self.view.slots.shape[1])
        return spans(min(self.settings.block_size, self.view.rows))

    def _order(self, diagonal: jax.Array) -> Order:
        """Return the rows in the order they are rounded in."""
        block = self._spans[0]
        if not self._dynamic:
            return ORDERS[self.settings.order](self.view, diagonal, block)
        order = ORDERS[self.settings.order](self.view, diagonal, 1)
        return by_slots(order, self.view, block)

    # ---------------------------------------------------------------------- scales

    def _importance(self, ready: Prepared) -> jax.Array:
        """Return what errors of rows cost in the scale search, ``[K]``."""
        f, of = ready.factor, ready.curvature
        if self.settings.search == "conditional":
            diagonal = ready.order.back(jnp.diagonal(f.lower) ** 2)
        else:
            diagonal = of.diagonal
        diagonal = jnp.where(of.dead, f.damping, diagonal)
        return jnp.where(f.ok, diagonal, jnp.float32(1))

    def _grid(self, ready: Prepared) -> tuple[Any, Grid]:
        """Return the scales of the weight as it is: as stored, and per row group."""
        if self._dynamic:
            # also for the groups that only fill the last span
            groups = ready.order.length // self.view.slots.shape[1]
            empty = jnp.zeros((groups, self.view.columns), jnp.float32)
            return None, Grid(empty, None if self.spec.symmetric else empty)
        view = self.view
        gram = None
        if self.settings.search == "output":
            gram = view.gram_blocks(ready.gram)
            identity = jnp.eye(gram.shape[-1], dtype=jnp.float32)
            gram = jnp.where(ready.factor.ok, gram, identity)
        groups = Groups(
            view.unfold(view.to_groups(ready.weight)),
            view.to_groups(self._importance(ready)),
            gram,
        )
        scale, zero = self._search(groups)
        stored, scale = settle_scale(view.groups_to_grid(scale), self.spec, view.where)
        zero = None if zero is None else view.groups_to_grid(zero)
        return stored, jax.tree.map(view.grid_to_groups, Grid(scale, zero))

    def _search(self, groups: Groups) -> tuple[jax.Array, jax.Array | None]:
        """Return scales and zero points by the search that was asked for."""
        search, options = self.settings.search, self.settings.search_options
        return search_scales(groups, self.spec, self.view.free_block, search, options)

    def _fit(self, ready: Prepared) -> Begin:
        """Return what chooses the scales of a group when it begins."""
        size = self.view.slots.shape[1]
        order = ready.order
        importance = order.take(self._importance(ready)).reshape(-1, size)
        # by groups, not by places
        which = jnp.argsort(jnp.asarray(order.groups)[::size])
        importance = importance[which]

        def begin(problem: Problem, state: Rounded, fed: jax.Array) -> Rounded:
            group = problem.groups[0]
            # what GPTQ's updated weights are before the first row of the group
            updated = state.error + lax.linalg.triangular_solve(
                problem.matrix, fed, left_side=True, lower=True
            )
            # the group's part of the Hessian, once later rows make up for it
            gram = jnp.dot(problem.matrix.T, problem.matrix, precision=HIGHEST)
            groups = Groups(
                self.view.unfold(updated[None]), importance[group][None], gram[None]
            )
            scale, zero = self._search(groups)
            row = Grid(
                spread_columns(scale, self.view)[0],
                None if zero is None else spread_columns(zero, self.view)[0],
            )
            return state._replace(grid=state.grid.with_row(group, row))

        return begin

    # -------------------------------------------------------------------- rounding

    def _round(self, ready: Prepared, grid: Grid, drift: jax.Array | None) -> Rounded:
        """Return the weight rounded by GPTQ, its rows in their natural order."""
        order = ready.order
        state = self._start(order.take(ready.weight), grid, drift is not None)
        problem = Problem(ready.factor.lower, jnp.asarray(order.groups), drift=drift)
        if self._dynamic:
            size = self.view.slots.shape[1]
            sweep = Sweep(self.spec, self._spans, group=size, begin=self._fit(ready))
        else:
            sweep = Sweep(self.spec, self._spans)
        state = sweep(problem, state).map_rows(order.back)
        real = len(self.view.slots)
        return state._replace(grid=jax.tree.map(lambda x: x[:real], state.grid))

    def _start(self, weight: jax.Array, grid: Grid, targets: bool) -> Rounded:
        """Return the state before anything is rounded."""
        codes = jnp.zeros(weight.shape, jnp.uint8)
        keep = targets or self.settings.compensated
        return Rounded(weight, codes, jnp.zeros_like(weight) if keep else None, grid)

    def _refine(self, ready: Prepared, state: Rounded) -> Rounded:
        """Return the weight refined by sweeps, where there is a usable Hessian."""
        sweep = refining(self.view, self.spec, self.settings.block_size)
        size, real = self.view.slots.shape[1], len(self.view.slots)
        order = natural(self.view, ready.curvature.diagonal, 1)
        order = by_slots(order, self.view, sweep.spans[0])
        fill = order.length // size - real
        ridge = jnp.full(order.length, ready.curvature.unit * ready.factor.damping)

        def refine(state: Rounded) -> Rounded:
            problem = Problem(
                order.take(order.take(ready.gram), axis=1),
                jnp.asarray(order.groups),
                # also where nothing is: a dead row, a place without a row
                jnp.maximum(ridge, TINY),
            )
            state = state.map_rows(order.take)
            grid = jax.tree.map(lambda x: jnp.pad(x, ((0, fill), (0, 0))), state.grid)
            once = lambda _, s: sweep(problem, s)
            state = state._replace(grid=grid)
            state = lax.fori_loop(0, self.settings.sweeps, once, state)
            grid = jax.tree.map(lambda x: x[:real], state.grid)
            return state.map_rows(order.back)._replace(grid=grid)

        return lax.cond(ready.factor.ok, refine, lambda state: state, state)

    # ---------------------------------------------------------------------- result

    def _assemble(
        self, weight: jax.Array, f: Factor, state: Rounded, static: Any
    ) -> Solved:
        """Return codes and scales in the weight's layout."""
        zero = None
        if state.grid.zero is not None:
            zero = self.view.columns_to_grid(state.grid.zero)
        if isinstance(self.spec.scale, str):
            scale = self.view.columns_to_grid(state.grid.scale)
            stored = store_scale(scale, self.spec.scale)
        else:
            stored = static
        q = assemble(
            self.view.from_matrix(state.codes),
            stored,
            zero,
            self.spec,
            self.view.where,
            dtype=weight.dtype,
        )
        target = None
        if state.target is not None and self.settings.compensated:
            target = self.view.from_matrix(state.target)
        info = {"damping": f.damping, "tries": f.tries, "ok": f.ok}
        return Solved(q, info, target)


@functools.partial(jax.jit, static_argnums=0)
def solve_layer(layer: Layer, weight: jax.Array, statistics: Statistics) -> Solved:
    """Return `Layer.solve`, compiled once per shape, called from where it may be."""
    return layer.solve(weight, statistics)
