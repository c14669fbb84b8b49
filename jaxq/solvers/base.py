"""What a solver is: a pure function from a weight and statistics to a `QTensor`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxq.qtensor import QTensor


class Statistics(NamedTuple):
    """What calibration saw of the activations that meet one weight.

    Leading axes ``*stack`` enumerate independent weights (layers, experts). ``K``
    counts the contracted elements, in the order of the weight's contracted axes.

    Attributes:
        gram: ``float32[*stack, K, K]``, the raw sum ``Σ x xᵀ`` over tokens.
        tokens: ``int32[*stack]``, how many tokens were summed.
        drift: ``float32[*stack, K, K]``, ``Σ (x_float − x) xᵀ``: how far the quantized
            prefix moved the activation (GPTAQ); None when not asked for.
        magnitude: ``float32[*stack, K]``, ``Σ |x|`` (AWQ).
        absmax: ``float32[*stack, K]``, ``max |x|`` (SmoothQuant, LLM.int8).
    """

    gram: jax.Array
    tokens: jax.Array
    drift: jax.Array | None = None
    magnitude: jax.Array | None = None
    absmax: jax.Array | None = None


class Solved(NamedTuple):
    """What a solver returns.

    Attributes:
        weight: the quantized weight.
        info: evidence as arrays by name, each ``[*stack]``: for example ``damping``
            (the share of the mean diagonal that was added) and ``ok`` (False: the
            Gram matrix could not be factored, and the weight is rounded to nearest).
        compensated: ``float32`` in the weight's own shape: the weight whose rounding
            to nearest gives the codes (GPTQ's updated columns), or None.
    """

    weight: QTensor
    info: dict[str, jax.Array]
    compensated: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Solver:
    """One row of the table of solvers.

    Attributes:
        name: by which recipes call it.
        run: ``run(weight, statistics, spec, *, axis, stacked, **options) -> Solved``.
        needs: the fields of `Statistics` that must be there; empty: data-free.
        optional: from the options to further fields that they need.
        order: in which it takes columns when an option does not say, for evidence.
        tunes: whether the pipeline tunes the result together with its whole block.
    """

    name: str
    run: Callable[..., Solved]
    needs: tuple[str, ...] = ()
    optional: Callable[[dict[str, Any]], tuple[str, ...]] = lambda options: ()
    order: str | None = None
    tunes: bool = False
