"""RTN: round to nearest, in ranges chosen without data or by what activations do."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.names import lookup
from jaxq.qtensor import QTensor
from jaxq.quantize import Axes, Blocking, assemble, encode, quantize, settle_scale
from jaxq.solvers.base import Solved, Statistics
from jaxq.solvers.clipping import CLIPPING, clipped_bounds
from jaxq.solvers.hessian import curvature
from jaxq.solvers.matrix import MatrixView
from jaxq.solvers.scale_search import Groups, check_search, search_scales
from jaxq.solvers.stacking import solve_each
from jaxq.spec import QuantSpec

# Searches among ranges that need the Gram matrix of the activations.
BY_ACTIVATIONS = ("importance", "output")


def rtn(
    weight: jax.Array,
    statistics: Statistics | None,
    spec: QuantSpec,
    *,
    axis: Axes = None,
    stacked: Sequence[int] = (),
    clip: str = "absmax",
    **options: Any,
) -> QTensor:
    """Round every weight to its nearest code: ``q = clip(⌊w / s⌉ + z)``.

    Args:
        weight: float, any shape.
        statistics: ``gram``, where the clipping needs it; otherwise unused.
        spec: format, blocks and scales.
        axis: the contracted axes.
        stacked: axes that enumerate independent weights.
        clip: how the range of a block is chosen: ``absmax`` (nothing clipped),
            ``percentile`` (option ``percent``) or ``mse`` (options ``steps``,
            ``smallest``, ``exponent``); and by activations ``importance`` (errors
            weighed by the diagonal of the Gram matrix; the same options) or ``output``
            (least output error of every group; ``steps``, ``smallest``).
        **options: of the clipping method.

    Raises:
        UnknownNameError: on an unknown clipping method, or an option it does not have.
        ValueError: when a centered or binary-coded spec is to be clipped, or clipping
            by activations has no Gram matrix.
    """
    if spec.center:
        if clip != "absmax" or options:
            raise ValueError(
                f"clip={clip!r} chooses a range of the weight, but center=True rounds "
                f"the weight less its mean: use clip='absmax', or center=False"
            )
        return quantize(weight, spec, axis, stacked=stacked)
    if spec.binary and clip != "absmax":
        raise ValueError(
            f"clip={clip!r} chooses a range for one scale per block, but binary=True "
            f"has one per bit: use the solver 'bcq', or clip='absmax'"
        )
    known: dict[str, Any] = CLIPPING | dict.fromkeys(BY_ACTIVATIONS)
    lookup(known, clip, "clipping method")
    if clip in BY_ACTIVATIONS:
        pairs = tuple(sorted(options.items()))
        check_search(clip, pairs)
        if statistics is None or statistics.gram is None:
            raise ValueError(
                f"clip={clip!r} needs the Gram matrix of the activations: calibrate "
                f"first, or use clip='mse'"
            )
        solve = functools.partial(_round_by_activations, spec, clip, pairs)
        seen = Statistics(statistics.gram, statistics.tokens)
        return solve_each(solve, weight, seen, spec, axis=axis, stacked=stacked).weight
    where = Blocking.of(spec, weight.shape, axis, stacked)
    bounds = clipped_bounds(weight, spec, where, clip, options)
    return quantize(weight, spec, axis, stacked=stacked, bounds=bounds)


def solve_rtn(*args: Any, **options: Any) -> Solved:
    """Return `rtn` as a row of the table of solvers: without evidence."""
    return Solved(rtn(*args, **options), {})


def optional_statistics(options: dict[str, Any]) -> tuple[str, ...]:
    """Return the statistics that `rtn` needs under these options."""
    return ("gram", "tokens") if options.get("clip") in BY_ACTIVATIONS else ()


def _round_by_activations(
    spec: QuantSpec,
    clip: str,
    options: tuple[tuple[str, Any], ...],
    weight: jax.Array,
    statistics: Statistics,
    contracting: tuple[int, ...],
) -> Solved:
    """Return one weight rounded in the ranges that activations ask for.

    Where the Gram matrix cannot be used, all rows count the same.
    """
    view = MatrixView.of(weight.shape, spec, contracting)
    view.check_square("gram", statistics.gram)
    of, size = curvature(statistics.gram), view.slots.shape[1]
    values, gram = weight.astype(jnp.float32), None
    if clip == "output":
        gram = view.gram_blocks(statistics.gram)
        gram = jnp.where(of.usable, gram, jnp.eye(size, dtype=jnp.float32))
    groups = Groups(
        view.unfold(view.to_groups(view.to_matrix(values))),
        view.to_groups(jnp.where(of.usable, of.diagonal, jnp.float32(1))),
        gram,
    )
    scale, zero = search_scales(groups, spec, view.free_block, clip, options)
    zero = None if zero is None else view.groups_to_grid(zero)
    stored, scale = settle_scale(view.groups_to_grid(scale), spec, view.where)
    codes = encode(values, scale, zero, spec, view.where.block)
    q = assemble(codes, stored, zero, spec, view.where, dtype=weight.dtype)
    return Solved(q, {})
