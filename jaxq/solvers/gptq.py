"""GPTQ: round row after row, and let the rows to come make up for the error."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.names import lookup
from jaxq.quantize import Axes, assemble, settle_scale
from jaxq.scales import store_scale
from jaxq.solvers import feedback
from jaxq.solvers.base import Solved, Statistics
from jaxq.solvers.feedback import Grid, Problem, Rounded, Sweep
from jaxq.solvers.hessian import Factor, Hessian, factor, hessian
from jaxq.solvers.matrix import MatrixView, spread_columns
from jaxq.solvers.order import ORDERS, Order, by_slots
from jaxq.solvers.scale_search import Groups, check_search, search_scales
from jaxq.solvers.stacking import solve_each
from jaxq.spec import QuantSpec

# Rows per unit inside a block: few enough that their errors stay in the cache.
UNIT = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `gptq`.

    Attributes:
        block_size: rows whose errors are spread at once; changes speed, not results.
        damping: added to the diagonal of the Hessian, as a share of its mean.
        order: which rows are rounded first: ``"activation"`` (those of the largest
            activations: later ones make up for them), ``"group"`` (whole groups by
            their largest, and likewise inside), ``"natural"``.
        static_groups: whether scales are those of the weight as it was. False: chosen
            when a group begins, from weights that make up for the groups before it.
        search: how ranges are chosen; see `jaxq.solvers.scale_search`.
        search_options: of the search, as pairs.
        drift: by how much the rows also make up for the drift of the quantized prefix
            (GPTAQ's alpha, there 0.25); above 0 it needs ``statistics.drift``.
        compensated: whether the updated weights are returned.
    """

    block_size: int = 128
    damping: float = 0.05
    order: str = "activation"
    static_groups: bool = True
    search: str = "importance"
    search_options: tuple[tuple[str, Any], ...] = ()
    drift: float = 0.0
    compensated: bool = False

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Settings":
        """Return settings; what is none of theirs is an option of the search.

        Raises:
            UnknownNameError: on an option that neither has.
            ValueError: naming the option, its value and its limits.
        """
        names = [f.name for f in dataclasses.fields(cls) if f.name != "search_options"]
        mine = {k: v for k, v in options.items() if k in names}
        rest = tuple(sorted((k, v) for k, v in options.items() if k not in names))
        return cls(**mine, search_options=rest)

    def __post_init__(self) -> None:
        """Reject what cannot be meant."""
        lookup(ORDERS, self.order, "order")
        check_search(self.search, [name for name, _ in self.search_options])
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(
                f"block_size={self.block_size!r} must be an integer >= 1; 128 is usual"
            )
        if not 0 <= self.damping <= 1:
            raise ValueError(
                f"damping={self.damping} is a share of the mean diagonal: give it in "
                f"[0, 1]; 0.01 to 0.1 is usual"
            )
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift={self.drift} must lie in [0, 1]; 0.25 is usual")
        if self.order == "activation" and not self.static_groups:
            raise ValueError(
                "order='activation' mixes the rows of all groups, so a group never "
                "begins: use static_groups=True, or order='group' or 'natural'"
            )


def gptq(
    weight: jax.Array,
    statistics: Statistics,
    spec: QuantSpec,
    *,
    axis: Axes = None,
    stacked: Sequence[int] = (),
    **options: Any,
) -> Solved:
    """Round to the codes of least output error, row by row: ``min tr(ΔᵀHΔ)``.

    ``q_k = round(w_k + Σ_{j<k} M_kj (w_j − q_j) / M_kk)``, where ``MᵀM = H`` is the
    damped Gram matrix of the activations and ``M`` is lower triangular: the rows still
    to come make up for the error of those that are rounded. The codes are those of
    Frantar et al. 2022 (https://arxiv.org/abs/2210.17323), whatever the block size.

    Args:
        weight: float, any shape.
        statistics: ``gram`` over the contracted elements, ``tokens``, and ``drift``
            when the option of that name is above 0.
        spec: format, blocks and scales; ``center=True`` is refused.
        axis: the contracted axes.
        stacked: axes that enumerate independent weights.
        **options: see `Settings`; and those of its scale search.

    Returns:
        The weight, and as evidence ``damping`` (what was added, as a share of the mean
        diagonal), ``tries`` (factorizations), ``ok`` (False: the Gram matrix is not
        finite, is zero or could not be factored; then the weight is rounded to nearest
        with scales that know no activation).

    Raises:
        ValueError: when the Gram matrix is missing or of another shape, or an option
            is out of range.

    Example:
        >>> import jax
        >>> from jaxq.solvers.base import Statistics
        >>> x = jax.random.normal(jax.random.key(0), (256, 64))
        >>> w = jax.random.normal(jax.random.key(1), (64, 8))
        >>> statistics = Statistics(x.T @ x, jax.numpy.int32(256))
        >>> solved = gptq(w, statistics, QuantSpec("int4", 32), order="natural")
        >>> bool(solved.info["ok"])
        True
    """
    settings = Settings.of(options)
    _check(spec, settings, statistics)

    def solve(w: jax.Array, seen: Statistics, contracting: tuple[int, ...]) -> Solved:
        view = MatrixView.of(w.shape, spec, contracting)
        return _solve(_Solve(view, spec, settings), w, seen)

    return solve_each(solve, weight, statistics, spec, axis=axis, stacked=stacked)


def _check(spec: QuantSpec, settings: Settings, statistics: Statistics | None) -> None:
    """Raise when the spec, the options and the statistics do not go together."""
    if spec.center:
        raise ValueError(
            "center=True stores a mean that codes do not see; GPTQ rounds the weight "
            "itself: use center=False (scales may be centered all the same)"
        )
    if isinstance(spec.scale, QuantSpec) and not settings.static_groups:
        raise ValueError(
            "static_groups=False chooses scales one group after the other, but this "
            "spec quantizes them together: use static_groups=True, or a scale dtype"
        )
    if statistics is None or statistics.gram is None:
        raise ValueError(
            "gptq needs the Gram matrix of the activations: calibrate first, or use "
            "solver='rtn'"
        )
    if settings.drift and statistics.drift is None:
        raise ValueError(
            f"drift={settings.drift} needs statistics of the drift between the float "
            f"and the quantized prefix: observe it, or use drift=0"
        )


@dataclasses.dataclass(frozen=True)
class _Solve:
    """One weight: from its matrix to codes and scales."""

    view: MatrixView
    spec: QuantSpec
    settings: Settings

    def run(self, weight: jax.Array, statistics: Statistics) -> Solved:
        """Return the solved weight."""
        matrix = self.view.to_matrix(weight.astype(jnp.float32))
        h = hessian(statistics.gram)
        order = self._order(jnp.diagonal(h.matrix))
        f = factor(h, order, self.settings.damping)
        importance = jnp.where(f.ok, jnp.diagonal(h.matrix), jnp.float32(1))
        stored, grid = self._grid(matrix, importance, order)
        problem = Problem(
            order.take(matrix),
            jnp.asarray(order.groups),
            f.lower,
            self._drift(h, f, order, statistics.drift),
        )
        done = self._sweep(order, importance)(problem, feedback.start(problem, grid))
        return self._assemble(weight, order, done, stored, f)

    @property
    def _dynamic(self) -> bool:
        """Whether scales are chosen as groups begin (the first begins as it was)."""
        return not self.settings.static_groups and len(self.view.slots) > 1

    @property
    def _block(self) -> tuple[int, int]:
        """Rows per block and per unit."""
        size = self.settings.block_size
        if self._dynamic:
            group = self.view.slots.shape[1]
            return max(size // group, 1) * group, group
        unit = UNIT if size % UNIT == 0 else size
        size = min(size, -(-self.view.rows // unit) * unit)
        return size, unit

    def _order(self, diagonal: jax.Array) -> Order:
        """Return the rows in the order they are rounded in."""
        block, _ = self._block
        if not self._dynamic:
            return ORDERS[self.settings.order](self.view, diagonal, block)
        order = ORDERS[self.settings.order](self.view, diagonal, 1)
        return by_slots(order, self.view, block)

    def _drift(
        self, h: Hessian, f: Factor, order: Order, drift: jax.Array | None
    ) -> jax.Array | None:
        """Return what GPTAQ feeds back targets by, ``α tril(M⁻ᵀ Dᵀ, −1)``.

        GPTAQ (Li et al. 2025, https://arxiv.org/abs/2504.02692) adds
        ``w_i P_{i,i+1:}`` with ``P = α triu(D Uᵀ, 1) U``; summed up over earlier rows
        as in `Sweep`, the last ``U`` cancels.
        """
        if not self.settings.drift:
            return None
        assert drift is not None
        moved = order.take(order.take(drift / h.unit), axis=1)
        solved = lax.linalg.triangular_solve(
            f.lower, moved.T, left_side=True, lower=True, transpose_a=True
        )
        by = self.settings.drift * jnp.tril(solved, -1)
        return jnp.where(f.ok & jnp.isfinite(by), by, jnp.float32(0))

    def _grid(
        self, matrix: jax.Array, importance: jax.Array, order: Order
    ) -> tuple[Any, Grid]:
        """Return the scales of the weight as it is: as stored, and per row group."""
        if self._dynamic:
            # also for the groups that only fill the last block
            shape = (order.length // self._block[1], self.view.columns)
            zero = None if self.spec.symmetric else jnp.zeros(shape, jnp.float32)
            return None, Grid(jnp.zeros(shape, jnp.float32), zero)
        groups = Groups(
            self.view.unfold(self.view.to_groups(matrix)),
            self.view.to_groups(importance),
        )
        scale, zero = self._search(groups)
        stored, scale = settle_scale(
            self.view.groups_to_grid(scale), self.spec, self.view.where
        )
        zero = None if zero is None else self.view.groups_to_grid(zero)
        grid = Grid(scale, zero)
        return (stored, zero), jax.tree.map(self.view.grid_to_groups, grid)

    def _search(self, groups: Groups) -> tuple[jax.Array, jax.Array | None]:
        """Return scales and zero points by the search that was asked for."""
        options = dict(self.settings.search_options)
        search = self.settings.search
        return search_scales(groups, self.spec, self.view.free_block, search, options)

    def _sweep(self, order: Order, importance: jax.Array) -> Sweep:
        """Return the pass over the rows."""
        block, unit = self._block
        if not self._dynamic:
            return Sweep(self.spec, block, unit)
        weights = order.take(importance).reshape(-1, unit)
        begins = jnp.asarray(order.groups)[::unit]

        def fit(updated: jax.Array, group: jax.Array, grid: Grid) -> Grid:
            here = jnp.argmax(begins == group)
            groups = Groups(
                self.view.unfold(updated[None]),
                lax.dynamic_slice_in_dim(weights, here, 1),
            )
            scale, zero = self._search(groups)
            row = Grid(
                spread_columns(scale, self.view),
                None if zero is None else spread_columns(zero, self.view),
            )
            write = lambda x, r: lax.dynamic_update_slice_in_dim(x, r, group, 0)
            return jax.tree.map(write, grid, row)

        return Sweep(self.spec, block, unit, fit=fit)

    def _assemble(
        self, weight: jax.Array, order: Order, done: Rounded, stored: Any, f: Factor
    ) -> Solved:
        """Return codes and scales in the weight's layout."""
        layout = lambda x: self.view.from_matrix(order.back(x))
        scales, zeros = self._stored(done.grid) if stored is None else stored
        q = assemble(
            layout(done.codes),
            scales,
            zeros,
            self.spec,
            self.view.where,
            dtype=weight.dtype,
        )
        info = {"damping": f.damping, "tries": f.tries, "ok": f.ok}
        compensated = layout(done.target) if self.settings.compensated else None
        return Solved(q, info, compensated)

    def _stored(self, grid: Grid) -> tuple[Any, jax.Array | None]:
        """Return the scales and zero points of all groups as they are stored."""
        assert isinstance(self.spec.scale, str)
        real = jax.tree.map(lambda x: x[: len(self.view.slots)], grid)
        scale, zero = jax.tree.map(self.view.columns_to_grid, real)
        return store_scale(scale, self.spec.scale), zero


@functools.partial(jax.jit, static_argnums=0)
def _solve(how: _Solve, weight: jax.Array, statistics: Statistics) -> Solved:
    """Return the solved weight; compiled once per shape, called from where it may."""
    return how.run(weight, statistics)
