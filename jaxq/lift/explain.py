"""`explain`: which kernel runs where, and why others declined."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxq.lift.quantized import named_arrays
from jaxq.lift.replay import Replay
from jaxq.lift.trace import Call, trace
from jaxq.lift.use import Use
from pallas_kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What happens to each quantized parameter, in the order of execution.

    Attributes:
        rows: one `Use` per meeting of a parameter and an operation.
        unused: paths of quantized parameters that no operation meets.
    """

    rows: tuple[Use, ...]
    unused: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Use]:
        """Iterate over the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @property
    def fallbacks(self) -> tuple[Use, ...]:
        """The rows where the whole parameter is dequantized first."""
        return tuple(
            r for r in self.rows if r.choice and "dequantize" in r.choice.kernel
        )

    def __str__(self) -> str:
        """Return a table: parameter, operation, kernel, why the others declined."""
        lines = []
        width = max((len(r.path) for r in self.rows), default=0)
        for row in self.rows:
            if row.choice is None:
                continue
            why = "; ".join(f"{k}: {r}" for k, r in row.choice.declined)
            lines.append(
                f"{row.path:<{width}}  {row.op:<14} -> {row.choice.kernel}"
                + (f"   ({why})" if why else "")
            )
        lines += [f"{path}: no operation meets it" for path in self.unused]
        return "\n".join(lines)


def explain(
    fn: Callable[..., Any],
    qparams: Any,
    *example: Any,
    target: Target | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say which kernel each quantized parameter of ``fn(qparams, *example)`` runs in.

    Nothing is computed: the function is traced and replayed on abstract values.

    Args:
        fn: the float function.
        qparams: its first argument, with `QTensor` leaves.
        *example: its other arguments, real or abstract.
        target: the chip to say it for; the one this runs on by default.
        **kwargs: its keyword arguments.

    Example:
        >>> import jax.numpy as jnp, jaxq
        >>> q = jaxq.quantize(jnp.ones((64, 8)), jaxq.QuantSpec("int8"))
        >>> rows = jaxq.explain(lambda w, x: x @ w, q, jnp.ones((2, 64)))
        >>> [row.choice.kernel for row in rows]
        ['xla.fused_dot']
    """
    call = Call.of((qparams, *example), kwargs)
    traced = trace(fn, call)
    replay = Replay(traced.jaxpr.jaxpr.debug_info, target=target)

    def run(arrays: list[Any]) -> list[jax.Array]:
        return replay.arrays(replay.run(traced.jaxpr, arrays), "output")

    named = named_arrays(call)
    jax.eval_shape(run, named)
    rows = tuple(dict.fromkeys(replay.uses))
    met = {row.path for row in rows}
    names = [a.name for a in named if getattr(a, "name", None) is not None]
    return Explanation(rows, tuple(n for n in names if n not in met))
