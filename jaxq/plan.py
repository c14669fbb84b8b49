"""The plan: for every parameter, what will be done, what it saves, or why not."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift import Use, parameter_uses
from jaxq.lift.trace import path_string
from jaxq.names import UnknownNameError
from jaxq.presets import as_recipe
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.quantize import padded_length
from jaxq.recipe import Recipe, Rule
from jaxq.scales import static_affine
from jaxq.solvers import solve_with
from jaxq.solvers.base import Statistics
from jaxq.spec import QuantSpec
from jaxq.transforms import TRANSFORMS


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """What happens to one parameter.

    Attributes:
        path: its path.
        shape: its shape.
        dtype: its dtype.
        ops: the operations that consume it.
        rule: the rule that applies, or None.
        contracting: its contracted axes (empty when it stays float).
        stacked: its axes that enumerate independent weights.
        bytes_before: its bytes now.
        bytes_after: its bytes afterwards.
        reason: why it stays float, or a remark.
        window: of a convolution, the contracted axes that are positions in its window.
        groups: of a convolution, the number of groups its features fall into.
        rounds: why it is rounded to nearest whatever its rule says, or empty.
        made: what it becomes, by shapes and dtypes; None: it stays float.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    ops: tuple[str, ...]
    rule: Rule | None
    contracting: tuple[int, ...]
    stacked: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    reason: str = ""
    window: tuple[int, ...] = ()
    groups: int = 1
    rounds: str = ""
    made: QTensor | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def spec(self) -> QuantSpec | None:
        """How the weight is quantized, or None."""
        return self.rule.weight if self.rule is not None else None

    @property
    def is_quantized(self) -> bool:
        """Whether the parameter is quantized at all."""
        return self.spec is not None

    @property
    def decision(self) -> str:
        """One line: the spec, the activation's spec and the solver, or ``float``."""
        if self.rule is None or self.rule.weight is None:
            return "float"
        act = self.rule.activation
        kind = "static" if self.rule.static else "dynamic"
        extra = "" if act is None else f" × {act.format} per {act.block} ({kind})"
        return f"{self.rule.weight.describe()}{extra}, {self.rule.method}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of all parameters, in the order of the tree.

    Attributes:
        recipe: the recipe that was planned.
        rows: one per parameter.
    """

    recipe: Recipe
    rows: tuple[PlanRow, ...]

    def __iter__(self) -> Iterator[PlanRow]:
        """Iterate over the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.rows)

    @property
    def quantized(self) -> tuple[PlanRow, ...]:
        """The rows of parameters that are quantized."""
        return tuple(row for row in self.rows if row.is_quantized)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters now."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters afterwards."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits per element over all parameters afterwards."""
        size = sum(math.prod(row.shape) for row in self.rows)
        return self.bytes_after * 8 / max(size, 1)

    def __str__(self) -> str:
        """Return a table, one line per parameter, and the totals."""
        width = max((len(row.path) for row in self.rows), default=4)
        lines = [
            f"{row.path:<{width}}  {'x'.join(map(str, row.shape)):>14}  "
            f"{row.bytes_before:>12,} -> {row.bytes_after:>11,}  {row.decision}"
            + (f"  ({row.reason})" if row.reason else "")
            for row in self.rows
        ]
        total = (
            f"{self.recipe.name}: {len(self.quantized)} of {len(self)} parameters, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes "
            f"({self.bytes_before / max(self.bytes_after, 1):.2f}x smaller), "
            f"{self.bits_per_weight:.3f} bits/weight"
        )
        return "\n".join([*lines, total])


def plan(
    fn: Any,
    params: Any,
    cfg: str | Recipe | QuantSpec,
    *example: Any,
    group_size: int | None = None,
    **kwargs: Any,
) -> Plan:
    """Say what quantizing would do, without a weight being read.

    With a function, its sites decide what can be quantized and along which axes.
    Without one (``fn=None``) only the Flax conventions are known: a matrix called
    ``kernel`` contracts its axis 0, a matrix called ``embedding`` is a table of rows;
    everything else stays float and the row says so.

    Args:
        fn: the function that uses the parameters, or None.
        params: its first argument: arrays or `jax.ShapeDtypeStruct`s.
        cfg: a preset's name, a `Recipe`, or a `QuantSpec` for every product.
        *example: the function's other arguments, real or abstract.
        group_size: replaces the recipe's group size.
        **kwargs: the function's keyword arguments.

    Raises:
        ValueError: when there are no parameters, a required rule matches nothing, a
            parameter is quantized already, or a rule cannot be applied to one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jax.ShapeDtypeStruct((128, 64), jnp.float32)}
        >>> x = jax.ShapeDtypeStruct((1, 128), jnp.float32)
        >>> rows = plan(lambda p, x: x @ p["w"], params, "w8a16", x)
        >>> [(row.path, row.bytes_after) for row in rows]
        [('w', 8448)]
    """
    recipe = as_recipe(cfg, group_size)
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    leaves = {path_string(path): leaf for path, leaf in flat if hasattr(leaf, "dtype")}
    if not leaves:
        raise ValueError(
            f"params ({type(params).__name__}) holds no arrays: give the tree of "
            f"parameters, for Flax Linen the {{'params': ...}} that init returns"
        )
    refuse_quantized(leaves)
    if fn is None:
        uses = conventional_uses(leaves)
    else:
        uses = parameter_uses(fn, abstract_params(params), *example, **kwargs)[0]
    rows = tuple(_row(path, leaf, recipe, uses, fn) for path, leaf in leaves.items())
    _check_rules(recipe, rows)
    return Plan(recipe, rows)


def abstract_params(params: Any) -> Any:
    """Return the tree with leaves that read themselves as shapes and dtypes."""

    def one(leaf: Any) -> Any:
        reads = hasattr(leaf, "read")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if reads else leaf

    return jax.tree.map(one, params, is_leaf=is_qtensor)


def refuse_quantized(leaves: dict[str, Any]) -> None:
    """Raise when a parameter is quantized already."""
    done = [path for path, leaf in leaves.items() if isinstance(leaf, QTensor)]
    if done:
        raise ValueError(
            f"{done[0]!r} is already quantized: {leaves[done[0]]!r} "
            f"({len(done)} such parameters). Quantize the original float weights, or "
            f"call jaxq.dequantize_params first and accept both errors"
        )


def conventional_uses(leaves: dict[str, Any]) -> list[Use]:
    """Return the uses that the Flax conventions promise, for lack of a function."""
    uses = []
    for path, leaf in leaves.items():
        names = [part for part in path.split("/") if part != "value"]
        last = names[-1] if names else ""
        if leaf.ndim == 2 and last == "kernel":
            uses.append(Use(path, "dot_general", (0,)))
        elif leaf.ndim == 2 and last == "embedding":
            uses.append(Use(path, "gather", (1,)))
    return uses


def _row(path: str, leaf: Any, recipe: Recipe, uses: Sequence[Use], fn: Any) -> PlanRow:
    """Decide about one parameter."""
    mine = [use for use in uses if use.path == path]
    products = [use for use in mine if use.is_site]
    ops = tuple(dict.fromkeys(use.op for use in mine))
    shape, size = tuple(leaf.shape), math.prod(leaf.shape) * leaf.dtype.itemsize
    row = functools.partial(PlanRow, path, shape, leaf.dtype.name, ops)
    rule = recipe.rule_for(path, ops)

    def stays(reason: str) -> PlanRow:
        return row(None, (), (), size, size, reason)

    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return stays("not a float parameter")
    if not products:
        return stays(_no_product(mine, fn))
    if not size:
        return stays("it has no elements")
    if rule is None:
        return stays("no rule matches")
    if rule.weight is None:
        return stays(f"rule {rule.match!r} keeps it float")
    first = next((use for use in products if use.op != "gather"), products[0])
    contracting, stacked = first.contracting or (), first.stacked
    rounds = _rounds(first, rule)
    applied = dataclasses.replace(rule, transforms=()) if rounds else rule
    after = _abstract(path, leaf, applied, first)
    remark = _remark(first, mine, leaf, after)
    if rounds:
        remark = "; ".join(filter(None, (remark, f"rounded to nearest: {rounds}")))
    kind = (first.window, first.groups, rounds)
    done = row(rule, contracting, stacked, size, after.nbytes, remark, *kind)
    made = dataclasses.replace(after, activation=rule.activation)
    return dataclasses.replace(done, made=made)


def _rounds(use: Use, rule: Rule) -> str:
    """Say why a convolution cannot be solved from data as its rule says, if so."""
    spec = rule.weight
    if use.op != "conv_general_dilated" or spec is None or not rule.needs_data:
        return ""
    for name, _ in rule.transforms:
        if TRANSFORMS[name].kind == "split":
            return f"{name!r} repeats the rows of a matrix, and this is a convolution"
        if use.groups > 1:
            return f"{name!r} scales channels, and its {use.groups} groups share none"
    plain = isinstance(spec.block, int) or spec.block == "channel"
    if use.groups > 1 and not (plain and isinstance(spec.scale, str)):
        return (
            f"its {use.groups} feature groups are weights of their own, and "
            f"{spec.describe()} spans them"
        )
    return ""


def _abstract(path: str, leaf: Any, rule: Rule, use: Use) -> QTensor:
    """Return what the rule makes of a parameter, without its values.

    Raises:
        ValueError: naming the parameter, when the rule's solver refuses it.
    """
    try:
        q = _abstractly_solved(leaf, rule, use)
    except UnknownNameError:
        raise
    except ValueError as error:
        raise ValueError(
            f"rule {rule.match!r} cannot be applied to {path!r} of shape "
            f"{tuple(leaf.shape)}: {error}"
        ) from error
    if not rule.static or rule.activation is None:
        return q
    lengths = [n if i in use.stacked else 1 for i, n in enumerate(leaf.shape)]
    kept = functools.partial(static_affine, spec=rule.activation)
    bound = jax.ShapeDtypeStruct(tuple(lengths), jnp.float32)
    scale, zero = jax.eval_shape(kept, bound, bound)
    return dataclasses.replace(q, activation_scale=scale, activation_zero=zero)


def _abstractly_solved(leaf: Any, rule: Rule, use: Use) -> QTensor:
    """Return what transforms and solver make of a weight and of any statistics."""
    contracting, stacked = use.contracting or (), use.stacked
    if rule.weight is None:
        raise ValueError(f"rule {rule.match!r} leaves weights float")
    shape, extra = list(leaf.shape), {}
    for name, options in rule.transforms:
        if TRANSFORMS[name].kind == "split":
            matrix = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
            run = functools.partial(TRANSFORMS[name].candidates, spec=rule.weight)
            rows, index = jax.eval_shape(
                functools.partial(run, **dict(options)), matrix
            )
            extra["rows"] = shape[contracting[0]]
            extra["input_index"] = jax.ShapeDtypeStruct((*index.shape, 1), jnp.int32)
            shape[contracting[0]] = rows.shape[-2]
    kept = {*contracting, *stacked} - set(use.window)
    if any(TRANSFORMS[name].kind == "scale" for name, _ in rule.transforms):
        along = [n if i in kept else 1 for i, n in enumerate(shape)]
        extra["input_scale"] = jax.ShapeDtypeStruct(tuple(along), jnp.float32)
    width = math.prod(shape[a] for a in contracting)
    stack = tuple(shape[a] for a in stacked)
    gram: Any = jax.ShapeDtypeStruct((*stack, width, width), jnp.float32)
    channel: Any = jax.ShapeDtypeStruct((*stack, width), jnp.float32)
    tokens: Any = jax.ShapeDtypeStruct(stack, jnp.int32)
    seen = Statistics(
        gram, tokens, gram if "drift" in rule.needs else None, *[channel] * 2
    )
    solve = functools.partial(
        solve_with,
        spec=rule.weight,
        solver=rule.solver,
        options=rule.options,
        contracting=contracting,
        stacked=stacked,
    )
    weight = jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    q = jax.eval_shape(solve, weight, seen).weight
    return dataclasses.replace(q, **extra)


def _no_product(mine: Sequence[Use], fn: Any) -> str:
    """Say why a parameter that no product consumes stays float."""
    if fn is None:
        return (
            "without a function only matrices named 'kernel' or 'embedding' are known"
        )
    if not mine:
        return "the function does not use it"
    met = ", ".join(dict.fromkeys(use.op for use in mine))
    if any(use.contracting is not None for use in mine):
        return f"met by {met}, along none of its axes"
    return f"met by {met}, not by a product"


def _remark(first: Use, mine: Sequence[Use], leaf: Any, after: Any) -> str:
    """Say what is worth knowing about a parameter that is quantized."""
    remarks = []
    axis = (first.contracting or (0,))[-1]
    length, block = leaf.shape[axis], after.block[axis]
    padded = padded_length(length, block, after.spec.bits)
    if padded != length:
        unit = f"groups of {block}" if block < length else "whole bytes"
        remarks.append(f"axis {axis} of {length} is padded to {padded} for {unit}")
    for use in mine:
        if not use.is_site:
            remarks.append(f"also met by {use.op}, which dequantizes it")
        elif use.contracting != first.contracting:
            remarks.append(
                f"also met by {use.op} over {use.contracting}, which dequantizes it"
            )
    return "; ".join(dict.fromkeys(remarks))


def _check_rules(recipe: Recipe, rows: Sequence[PlanRow]) -> None:
    """Raise when a rule matches nothing, or the whole recipe does."""
    for rule in recipe.rules:
        if not rule.required or any(row.rule is rule for row in rows):
            continue
        hits = [row for row in rows if rule.matches(row.path, row.ops)]
        if rule.weight is None and hits:
            continue
        if not hits:
            raise _matches_nothing(rule, recipe, rows)
        raise ValueError(
            f"rule {rule.match!r} of recipe {recipe.name!r} quantizes nothing: "
            f"{hits[0].path!r} {_why_not(hits[0], rule)}"
            + (f" (and {len(hits) - 1} more)" if len(hits) > 1 else "")
        )


def _matches_nothing(rule: Rule, recipe: Recipe, rows: Sequence[PlanRow]) -> ValueError:
    """Return the error, with the path that is most like the pattern."""
    near = _nearest(rule.match, [row.path for row in rows])
    hint = f"; did you mean to match {near!r}?" if near else "."
    paths = ", ".join(row.path for row in rows[:6])
    ops = f" met by {' or '.join(rule.ops)}" if rule.ops else ""
    return ValueError(
        f"rule {rule.match!r} of recipe {recipe.name!r} matches no parameter{ops}"
        f"{hint} Correct the pattern, or give the rule required=False. "
        f"Parameters: {paths}{', ...' if len(rows) > 6 else ''}"
    )


def _nearest(match: str, paths: Sequence[str]) -> str | None:
    """Return the path of which some run of parts is most like the pattern's letters."""
    letters = re.sub(r"[^\w/]", "", match.removeprefix("re:")).strip("/")
    length = letters.count("/") + 1

    def likeness(path: str) -> float:
        parts = path.split("/")
        starts = range(max(len(parts) - length, 0) + 1)
        runs = ("/".join(parts[i : i + length]) for i in starts)
        matchers = (difflib.SequenceMatcher(None, letters, run) for run in runs)
        return max(m.ratio() for m in matchers)

    best = max(paths, key=likeness)
    return best if likeness(best) >= 0.6 else None


def _why_not(row: PlanRow, rule: Rule) -> str:
    """Say why a rule did not get a parameter that it matches."""
    if row.is_quantized:
        return f"is taken by an earlier rule, {row.rule.match!r}" if row.rule else ""
    return f"stays float: {row.reason}"
