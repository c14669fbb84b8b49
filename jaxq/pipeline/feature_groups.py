"""The feature groups of a convolution as weights that are stacked along an axis."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxq.qtensor import QTensor
from jaxq.solvers.base import Solved
from jaxq.views import map_fields


@dataclasses.dataclass(frozen=True)
class FeatureGroups:
    """Where a kernel's outputs fall into groups: ``[..., O]`` as ``[..., G, O / G]``.

    Every group is a weight of its own, since it meets channels of its own. Solved side
    by side they make the tensor that the whole kernel would: blocks of scales lie along
    the contraction, so none spans two outputs.

    Attributes:
        axis: the kernel's axis of outputs.
        contracting: the contracted axes when the outputs are split.
        stacked: the stacked axes then, the groups' among them.
    """

    axis: int
    contracting: tuple[int, ...]
    stacked: tuple[int, ...]

    @classmethod
    def of(
        cls, contracting: Sequence[int], stacked: Sequence[int], shape: Sequence[int]
    ) -> "FeatureGroups":
        """Return the groups of a kernel, from its own contracted and stacked axes."""
        others = {*contracting, *stacked}
        (axis,) = (i for i in range(len(shape)) if i not in others)
        moved = lambda axes: [i + (i > axis) for i in axes]
        return cls(
            axis, tuple(moved(contracting)), tuple(sorted([*moved(stacked), axis]))
        )

    @property
    def place(self) -> int:
        """Where the groups come among the stacked axes."""
        return self.stacked.index(self.axis)

    def split(self, x: jax.Array, groups: int) -> jax.Array:
        """Return an array of the kernel's layout with an axis of its groups."""
        axis = self.axis
        each = x.shape[axis] // groups
        return x.reshape(*x.shape[:axis], groups, each, *x.shape[axis + 1 :])

    def join(self, solved: Solved) -> Solved:
        """Return what was solved of the groups as that of the whole kernel."""
        q, target = solved.weight, solved.compensated
        return Solved(
            self._joined(q),
            solved.info,
            None if target is None else self._merged(target),
        )

    def _joined(self, q: QTensor) -> QTensor:
        """Return the whole tensor: the same arrays, group after group."""
        packed, axis = q.axis % q.ndim, self.axis
        block = (*q.block[:axis], *q.block[axis + 1 :])
        whole = map_fields(q, self._merged)
        place = packed - (packed > axis) - (q.ndim - 1)
        return dataclasses.replace(whole, axis=place, block=block)

    def _merged(self, a: jax.Array) -> jax.Array:
        axis = self.axis
        return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
