"""GPTQ: round row after row, and let the rows to come make up for the error."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxq.quantize import Axes
from jaxq.solvers.base import Solved, Statistics
from jaxq.solvers.gptq_layer import Layer, solve_layer
from jaxq.solvers.gptq_settings import Settings
from jaxq.solvers.matrix import MatrixView
from jaxq.solvers.stacking import solve_each
from jaxq.spec import QuantSpec


def gptq(
    weight: jax.Array,
    statistics: Statistics | None,
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
    With ``sweeps``, scales and codes are then refined one at a time.

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
    seen = _checked(spec, settings, statistics)

    def solve(w: jax.Array, seen: Statistics, contracting: tuple[int, ...]) -> Solved:
        view = MatrixView.of(w.shape, spec, contracting)
        view.check_square("gram", seen.gram)
        if seen.drift is not None:
            view.check_square("drift", seen.drift)
        return solve_layer(Layer(view, spec, settings), w, seen)

    return solve_each(solve, weight, seen, spec, axis=axis, stacked=stacked)


def _checked(
    spec: QuantSpec, settings: Settings, statistics: Statistics | None
) -> Statistics:
    """Return what of the statistics is used, when all goes together."""
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
    drift = statistics.drift if settings.drift else None
    return Statistics(statistics.gram, statistics.tokens, drift)
