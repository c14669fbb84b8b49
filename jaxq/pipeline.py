"""From float parameters to quantized ones: plan, calibrate, solve."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift import tapped
from jaxq.lift.trace import path_string
from jaxq.observers import Observer, minmax
from jaxq.plan import Plan, PlanRow, plan
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.recipe import Recipe
from jaxq.scales import divide
from jaxq.sharding import solve_on_mesh
from jaxq.spec import QuantSpec

# (row that is done, how many are done, how many there are)
Progress = Callable[[PlanRow, int, int], None]


def quantize_params(
    params: Any,
    cfg: str | Recipe | QuantSpec,
    fn: Callable[..., Any] | None = None,
    calibration: Iterable[Sequence[Any]] | None = None,
    *,
    group_size: int | None = None,
    progress: Progress | None = None,
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
        group_size: replaces the recipe's group size.
        progress: called after every parameter.

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
    batches = None if calibration is None else list(calibration)
    example = _example(fn, batches)
    todo = plan(fn, params, cfg, *example, group_size=group_size)
    if not todo.quantized:
        reasons = "; ".join(f"{row.path}: {row.reason}" for row in todo.rows[:4])
        raise ValueError(
            f"recipe {todo.recipe.name!r} quantizes nothing ({reasons}). Pass the "
            f"function that uses the parameters as fn= with one batch as calibration="
        )
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    rows = {row.path: row for row in todo.rows}
    refuse_non_finite([(path_string(p), leaf) for p, leaf in flat], rows)
    scales = _static_scales(todo, params, fn, batches)
    out, done = [], 0
    for path, leaf in flat:
        row = rows.get(path_string(path))
        if row is None or row.rule is None or not row.is_quantized:
            out.append(leaf)
            continue
        out.append(_quantize_one(leaf, row, scales.get(row.path)))
        done += 1
        if progress is not None:
            progress(row, done, len(todo.quantized))
    return jax.tree.unflatten(treedef, out)


def dequantize_params(qparams: Any) -> Any:
    """Return the tree with every `QTensor` replaced by the array it stands for."""

    def one(leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(one, qparams, is_leaf=is_qtensor)


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Sequence[Any]],
    observers: Mapping[str, Observer],
) -> dict[str, dict[str, Any]]:
    """Run ``fn`` on every batch and observe the activation of each product.

    Args:
        fn: called as ``fn(params, *batch)``.
        params: its parameters.
        batches: tuples of its other arguments. Python numbers, strings and None among
            them are constants.
        observers: by name; see `jaxq.observers`.

    Returns:
        For each parameter's path the state of every observer. A parameter used several
        times is observed over all uses; inside a scan states are stacked over layers.

    Raises:
        ValueError: when there is no batch.
    """

    def tap(path: str, x: jax.Array) -> dict[str, Any]:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return {n: o.update(o.init(like), x) for n, o in observers.items()}

    def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {name: o.merge(a[name], b[name]) for name, o in observers.items()}

    def steps(*constants: int) -> Callable[..., dict[str, list[Any]]]:
        return jax.jit(tapped(fn, tap), static_argnums=constants)

    compiled = functools.cache(steps)
    total: dict[str, dict[str, Any]] = {}
    for batch in batches:
        constants = (i for i, x in enumerate(batch, 1) if _is_constant(x))
        for path, uses in compiled(*constants)(params, *batch).items():
            seen = functools.reduce(merge, uses)
            total[path] = merge(total[path], seen) if path in total else seen
    if not total:
        raise ValueError(
            "calibration saw no activation: the batches are empty, or the function "
            "multiplies with none of its parameters"
        )
    return total


def _is_constant(argument: Any) -> bool:
    """Whether a traced function sees this argument as it is."""
    return argument is None or isinstance(argument, bool | int | float | str)


def refuse_non_finite(
    leaves: Sequence[tuple[str, Any]], rows: Mapping[str, PlanRow]
) -> None:
    """Raise, before any work, when a weight to be quantized holds NaN or Inf."""
    bad = []
    for path, leaf in leaves:
        row = rows.get(path)
        traced = isinstance(leaf, jax.core.Tracer)
        if row is None or not row.is_quantized or traced:
            continue
        count = int(_count_non_finite(leaf))
        if count:
            bad.append(f"{path!r} ({count:,} of {leaf.size:,} values)")
    if bad:
        raise ValueError(
            f"NaN or Inf in {', '.join(bad)}: no scale can represent them. Repair the "
            f"checkpoint, or keep these parameters float with a rule like "
            f"Rule('<path>', weight=None)"
        )


@jax.jit
def _count_non_finite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))


def _example(fn: Any, batches: list[Sequence[Any]] | None) -> Sequence[Any]:
    """Return the arguments that show the function's shapes."""
    if fn is None:
        if batches is not None:
            raise ValueError(
                "calibration= was given without fn=: pass the function that is to be "
                "run on it"
            )
        return ()
    if not batches:
        raise ValueError(
            "fn= was given without a batch: pass calibration=[(x, ...)] with at least "
            "one tuple of the function's other arguments (it shows their shapes)"
        )
    if not isinstance(batches[0], tuple | list):
        raise ValueError(
            f"a calibration batch must be a tuple of fn's other arguments, got "
            f"{type(batches[0]).__name__}: write calibration=[(x,), ...]"
        )
    return batches[0]


def _static_scales(
    todo: Plan, params: Any, fn: Any, batches: list[Sequence[Any]] | None
) -> dict[str, jax.Array]:
    """Return the activation scales that rules ask to be calibrated, by path."""
    static = [row for row in todo.quantized if row.rule and row.rule.static]
    if not static:
        return {}
    if fn is None or not batches:
        raise ValueError(
            f"{static[0].path!r} gets a static activation scale, which needs data: "
            f"pass fn= and calibration="
        )
    seen = calibrate(fn, params, batches, {"range": minmax()})
    scales = {}
    for row in static:
        if row.path not in seen or row.rule is None or row.rule.activation is None:
            raise ValueError(
                f"no activation of {row.path!r} was seen during calibration, so it has "
                f"no static scale: use a dynamic activation scale for it"
            )
        largest = seen[row.path]["range"].absmax
        traced = isinstance(largest, jax.core.Tracer)
        if not traced and not bool(jnp.all(jnp.isfinite(largest))):
            raise ValueError(
                f"calibration saw NaN or Inf in the activation of {row.path!r}, so it "
                f"has no static scale: repair the data or the model"
            )
        scale = divide(largest, row.rule.activation.number_format.highest)
        scales[row.path] = _per_weight(scale, row)
    return scales


def _per_weight(scale: jax.Array, row: PlanRow) -> jax.Array:
    """Give a static scale the weight's rank, one number per independent weight.

    Calibration has one number per step of the enclosing scans; the weights of a batch
    (experts) share theirs.
    """
    lengths = [n if i in row.stacked else 1 for i, n in enumerate(row.shape)]
    choices = itertools.combinations(row.stacked, scale.ndim)
    loops = next(c for c in choices if scale.shape == tuple(lengths[i] for i in c))
    shape = [n if i in loops else 1 for i, n in enumerate(lengths)]
    return jnp.broadcast_to(scale.reshape(shape), lengths)


def _quantize_one(leaf: jax.Array, row: PlanRow, scale: jax.Array | None) -> QTensor:
    """Quantize one parameter as its row says, and place it as it was placed."""
    rule = row.rule
    assert rule is not None
    solve = functools.partial(
        rule.solve, contracting=row.contracting, stacked=row.stacked
    )
    q = solve_on_mesh(solve, leaf)
    return dataclasses.replace(q, activation=rule.activation, activation_scale=scale)
