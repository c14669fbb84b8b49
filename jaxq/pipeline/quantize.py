"""From float parameters to quantized ones: plan, calibrate, solve."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxq.pipeline.checks import example_of, refuse_empty, refuse_non_finite
from jaxq.pipeline.evidence import Evidence
from jaxq.pipeline.journal import Memory
from jaxq.pipeline.run import Calibration, Progress, named_leaves, run_plan
from jaxq.plan import plan
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.recipe import Recipe
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized parameters, and the evidence of how they were made.

    Attributes:
        params: the same tree as the float one.
        evidence: of every quantized weight, in the order of execution.
    """

    params: Any
    evidence: tuple[Evidence, ...]


def quantize_params(
    params: Any,
    cfg: str | Recipe | QuantSpec,
    fn: Callable[..., Any] | None = None,
    calibration: Iterable[Sequence[Any]] | None = None,
    **options: Any,
) -> Any:
    """Return the same tree with weights replaced by `QTensor`s.

    Args:
        params: the parameters, any pytree of arrays.
        cfg: a preset's name, a `Recipe`, or a `QuantSpec` for every product.
        fn: the function that uses them, called as ``fn(params, *batch)``. With it,
            whatever it multiplies with can be quantized; without it only Flax's
            ``kernel`` and ``embedding`` matrices are known (see `jaxq.plan`).
        calibration: batches, each a tuple of ``fn``'s other arguments. The first also
            shows the function's shapes; data is used only by recipes that need it.
        **options: as in `quantize_with_evidence`.

    Raises:
        ValueError: on NaN or Inf weights (all such parameters are named before any work
            is done; inside `jax.jit` values are not known, and not checked), a
            parameter that is quantized already, a rule that matches nothing, a recipe
            that quantizes nothing, or missing calibration data.

    Example:
        >>> import jax, jaxq
        >>> params = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
        >>> fn = lambda p, x: x @ p["w"]
        >>> batch = (jax.numpy.ones((1, 128)),)
        >>> jaxq.quantize_params(params, "w8a16", fn, [batch])["w"].bits_per_weight
        8.25
    """
    return quantize_with_evidence(params, cfg, fn, calibration, **options).params


def quantize_with_evidence(  # noqa: PLR0913  one verb, and what it may be told
    params: Any,
    cfg: str | Recipe | QuantSpec,
    fn: Callable[..., Any] | None = None,
    calibration: Iterable[Sequence[Any]] | None = None,
    *,
    group_size: int | None = None,
    masks: Iterable[jax.Array] | None = None,
    blocks: Sequence[str] = (),
    progress: Progress | None = None,
) -> Quantized:
    """Quantize as `quantize_params` does, and say what was done to every weight.

    Weights that need data are calibrated in the order in which ``fn`` uses them, each
    on what the quantized weights before it compute. ``fn`` is traced and cut at its
    products, so this holds for any function; a weight that stands at several places, or
    in a loop that cannot be opened, is calibrated on the float model, and its evidence
    says so.

    Args:
        params: as there.
        cfg: as there.
        fn: as there.
        calibration: as there.
        group_size: replaces the recipe's group size.
        masks: for every batch which tokens count, ``bool[batch, tokens]``: padding is
            left out of all statistics.
        blocks: regular expressions for paths: weights for which one finds the same text
            belong to one block. By default the path up to its first number.
        progress: called after every parameter.

    Raises:
        ValueError: as there; and on NaN or Inf in an activation, on weights that no
            token reached, and on activations that are constant.
    """
    batches = None if calibration is None else list(calibration)
    example = example_of(fn, batches)
    todo = plan(fn, params, cfg, *example, group_size=group_size)
    refuse_empty(todo)
    leaves, treedef = named_leaves(params)
    refuse_non_finite(leaves, todo)
    journal = Memory()
    data = Calibration(fn, batches or [], masks, tuple(blocks))
    evidence = run_plan(todo, params, data, journal, progress)
    out = [journal.leaves.get(path, leaf) for path, leaf in leaves.items()]
    return Quantized(jax.tree.unflatten(treedef, out), tuple(evidence))


def dequantize_params(qparams: Any) -> Any:
    """Return the tree with every `QTensor` replaced by the array it stands for."""

    def one(leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(one, qparams, is_leaf=is_qtensor)
