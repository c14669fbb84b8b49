"""After GPTQ: scales and codes one at a time, each the best for what the others are."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.scales import round_scale
from jaxq.solvers.feedback import Grid, Problem, Rounded, Sweep, spans, units
from jaxq.solvers.matrix import MatrixView
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Refit:
    """The scale of least output error for given codes, when a row group begins.

    With ``v`` the codes over the scale and ``f`` what other groups feed back, the loss
    ``(w − s v)ᵀ H (w − s v) + 2 fᵀ (w − s v)`` is least at
    ``s = vᵀ(H w + f) / vᵀ H v``. It is rounded as scales are stored, and taken when
    that is nearer to the best one than the scale was: the loss never grows. A scale
    that several columns share is fitted to all of them.

    Attributes:
        view: the weight's rows and columns.
        spec: how it is quantized; scales have a dtype.
    """

    view: MatrixView
    spec: QuantSpec

    def __call__(self, problem: Problem, state: Rounded, fed: jax.Array) -> Rounded:
        """Return the state with the group's scales refitted; a `feedback.Begin`."""
        group = problem.groups[0]
        old = state.grid.row(group)
        v = units(state.codes, old, self.spec)
        curved = jnp.dot(problem.square(), v, precision=jax.lax.Precision.HIGHEST)
        # vᵀ(H w + f) = vᵀ(H Δ + f) + s vᵀ H v, and Hᵀ = H
        slope = self.view.sum_columns(jnp.sum(curved * state.error + v * fed, 0))
        bend = self.view.sum_columns(jnp.sum(curved * v, 0))
        best = old.scale + slope / jnp.where(bend > 0, bend, jnp.float32(1))
        new = round_scale(best, self.spec)
        better = (bend > 0) & (jnp.abs(new - best) < jnp.abs(old.scale - best))
        scale = jnp.where(better & (new * old.scale > 0), new, old.scale)
        return state._replace(
            error=state.error + v * (old.scale - scale),
            grid=state.grid.with_row(group, Grid(scale, old.zero)),
        )


def refining(view: MatrixView, spec: QuantSpec, block: int) -> Sweep:
    """Return the pass that refines a weight: coordinate descent on ``tr(ΔᵀHΔ)``.

    Group after group, the scales are refitted, then every code becomes the best one for
    what all the others are (QuantEase, Behdin et al. 2023). No step makes the loss
    larger. Scales that are quantized in turn stay as they are.

    Args:
        view: the weight's rows and columns.
        spec: how it is quantized.
        block: about how many rows' errors are spread at once.
    """
    size = view.slots.shape[1]
    begin = Refit(view, spec) if isinstance(spec.scale, str) else None
    return Sweep(spec, spans(block, size), first=False, group=size, begin=begin)
