"""`sites`: where a function multiplies with its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift.replay import Replay
from jaxq.lift.trace import Call, trace
from jaxq.lift.use import Use
from jaxq.lift.weight import Weight


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where a parameter meets an activation.

    Attributes:
        path: the parameter's path, for example ``params/Dense_0/kernel``.
        op: ``dot_general``, ``ragged_dot``, ``conv_general_dilated`` or ``gather``.
        contracting: the parameter's axes that are summed over; for a gather the axes of
            a row.
        stacked: its axes that enumerate independent weights (scanned layers, experts,
            batch dimensions).
        activation: shape and dtype of the other operand (None for a gather); inside a
            scan, of one step.
        shape: the parameter's shape.
    """

    path: str
    op: str
    contracting: tuple[int, ...]
    stacked: tuple[int, ...]
    activation: jax.ShapeDtypeStruct | None
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        """Say it in one line."""
        shape = "x".join(map(str, self.shape))
        stacked = f", stacked {self.stacked}" if self.stacked else ""
        x = self.activation
        act = "" if x is None else f", activation {x.dtype.name}{list(x.shape)}"
        return (
            f"Site({self.path} [{shape}]: {self.op} over {self.contracting}"
            f"{stacked}{act})"
        )


def sites(
    fn: Callable[..., Any], params: Any, *example: Any, **kwargs: Any
) -> list[Site]:
    """Return every product of a parameter in ``fn(params, *example)``, in order.

    The function is traced once on abstract shapes and each float parameter followed
    through casts, transposes, reshapes, slices, scans, checkpoints, calls and branches
    to the operations that consume it. Nothing is guessed from names or shapes.

    Args:
        fn: any function that `jax.jit` could trace.
        params: its first argument: arrays or `jax.ShapeDtypeStruct`s.
        *example: its other arguments, real or abstract.
        **kwargs: its keyword arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> sites(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
        [Site(w [4x2]: dot_general over (0,), activation float32[1, 4])]
    """
    found, shapes = parameter_uses(fn, params, *example, **kwargs)
    return [
        Site(
            use.path,
            use.op,
            use.contracting,
            use.stacked,
            use.activation,
            shapes[use.path],
        )
        for use in found
        if use.is_site and use.contracting is not None
    ]


def parameter_uses(
    fn: Callable[..., Any], params: Any, *example: Any, **kwargs: Any
) -> tuple[list[Use], dict[str, tuple[int, ...]]]:
    """Return all uses of the float parameters, products or not, and their shapes."""
    call = Call.of((params, *example), kwargs)
    traced = trace(fn, call)
    replay = Replay(traced.jaxpr.jaxpr.debug_info)
    watched = [
        call.arguments[i] == 0 and jnp.issubdtype(call.leaves[i].dtype, jnp.floating)
        for i in call.dynamic
    ]

    def run(*arrays: jax.Array) -> list[jax.Array]:
        leaves = [
            Weight.of(a, call.paths[i]) if watch and a.ndim else a
            for a, i, watch in zip(arrays, call.dynamic, watched, strict=True)
        ]
        return replay.arrays(replay.run(traced.jaxpr, leaves), "output")

    jax.eval_shape(run, *call.avals())
    shapes = {call.paths[i]: tuple(call.leaves[i].shape) for i in call.dynamic}
    return _distinct(replay.uses), shapes


def _distinct(uses: list[Use]) -> list[Use]:
    """Drop repetitions: tracing a loop's body twice is still one use of it."""
    return list(dict.fromkeys(uses))
