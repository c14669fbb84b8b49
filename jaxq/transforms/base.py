"""What a transform is: a pure function that proposes an equivalent product."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Transform:
    """One row of the table of transforms.

    A ``"scale"`` multiplies the rows of the weights that share an activation by ``s``,
    and divides the activation by it: ``x @ w = (x / s) @ (s · w)``. It is called as
    ``candidates(weights, *statistics, group, **options)``, with the weights as a
    sequence of ``float32[*stack, K, N_i]``, and returns ``float32[C, *stack, K]``:
    positive, finite candidates for ``s``, of which one is chosen by the error it
    leaves.

    A ``"split"`` stores a row of a weight as several, which add up to it:
    ``x @ w = x[..., index] @ w'``. It is called as ``candidates(weight, spec,
    **options)`` with ``float32[*stack, K, N]``, and returns ``w'[*stack, K', N]`` and
    ``index: int32[*stack, K']``: a single candidate.

    Attributes:
        name: by which recipes call it.
        kind: ``"scale"`` or ``"split"``.
        needs: the statistics that come behind the weights, in this order: ``absmax``
            (``float32[*stack, K]``, ``max |x|``), ``magnitude`` (``Σ |x|``) or
            ``tokens`` (``int32[*stack]``).
        candidates: see above.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    candidates: Callable[..., Any]
