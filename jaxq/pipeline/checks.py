"""What is refused before any work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.plan import Plan


def example_of(
    fn: Callable[..., Any] | None, batches: Sequence[Sequence[Any]] | None
) -> Sequence[Any]:
    """Return the arguments that show the function's shapes.

    Raises:
        ValueError: when there is a function and no batch, or the other way around.
    """
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
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise ValueError(
                f"a calibration batch must be a tuple of fn's other arguments, got "
                f"{type(batch).__name__}: write calibration=[(x,), ...]"
            )
    return batches[0]


def refuse_empty(todo: Plan) -> None:
    """Raise when a plan quantizes nothing."""
    if todo.quantized:
        return
    reasons = "; ".join(f"{row.path}: {row.reason}" for row in todo.rows[:4])
    raise ValueError(
        f"recipe {todo.recipe.name!r} quantizes nothing ({reasons}). Pass the "
        f"function that uses the parameters as fn= with one batch as calibration="
    )


def refuse_non_finite(leaves: Mapping[str, Any], todo: Plan) -> None:
    """Raise when a weight to be quantized holds NaN or Inf.

    Weights that are read from files later are looked at when they are read, and inside
    `jax.jit` no values are known.
    """
    bad = []
    for row in todo.quantized:
        leaf = leaves[row.path]
        if isinstance(leaf, jax.core.Tracer) or hasattr(leaf, "read"):
            continue
        count = int(_count_non_finite(leaf))
        if count:
            bad.append(f"{row.path!r} ({count:,} of {leaf.size:,} values)")
    if bad:
        raise ValueError(
            f"NaN or Inf in {', '.join(bad)}: no scale can represent them. Repair the "
            f"checkpoint, or keep these parameters float with a rule like "
            f"Rule('<path>', weight=None)"
        )


@jax.jit
def _count_non_finite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))


def is_constant(argument: Any) -> bool:
    """Whether a traced function sees this argument as it is."""
    return argument is None or isinstance(argument, bool | int | float | str)
