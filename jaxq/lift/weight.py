"""`Weight`: a float parameter that remembers which of its axes are where."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
from jax.tree_util import register_dataclass

from jaxq.views import axis_groups

Labels = tuple[frozenset[int], ...]


@functools.partial(
    register_dataclass,
    data_fields=["value"],
    meta_fields=["path", "labels", "full", "index", "flipped"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A view of a parameter on its way to the operations that consume it.

    Attributes:
        value: the array.
        path: the parameter's path.
        labels: for each trailing axis the axes of the parameter it consists of. There
            may be more labels than axes: a scan takes leading axes away.
        full: the parameter's own shape.
        index: which step's slice it is, one number per unrolled scan.
        flipped: the parameter's axes that it runs through from the end.
    """

    value: jax.Array
    path: str
    labels: Labels
    full: tuple[int, ...]
    index: tuple[int, ...] = ()
    flipped: frozenset[int] = frozenset()

    @classmethod
    def of(cls, value: jax.Array, path: str) -> "Weight":
        """Wrap a whole parameter."""
        labels = tuple(frozenset([i]) for i in range(value.ndim))
        return cls(value, path, labels, tuple(value.shape))

    @property
    def axes(self) -> Labels:
        """The labels of the axes that are still there."""
        return self.labels[len(self.labels) - self.value.ndim :]

    @property
    def stacked(self) -> tuple[int, ...]:
        """The parameter's axes that an enclosing loop or an index has consumed."""
        here = frozenset().union(*self.axes)
        return tuple(i for i in range(len(self.full)) if i not in here)

    def original(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Return the parameter's axes behind axes of this view."""
        union = frozenset().union(*(self.axes[i] for i in axes))
        return tuple(sorted(union))

    def view(self, apply: Callable[[jax.Array], jax.Array], labels: Labels) -> "Weight":
        """Return the view that ``apply`` makes of the array, with its labels."""
        return dataclasses.replace(self, value=apply(self.value), labels=labels)

    def turned(self, axes: Sequence[int]) -> "Weight":
        """Return the view, noted to run through some of its axes the other way."""
        turned = self.flipped.symmetric_difference(self.original(axes))
        return dataclasses.replace(self, flipped=turned)


def reshaped(labels: Labels, old: Sequence[int], new: Sequence[int]) -> Labels:
    """Return the labels after a reshape: merged axes unite theirs, split ones share."""
    out: list[frozenset[int]] = [frozenset()] * len(new)
    for sources, targets in axis_groups(tuple(old), tuple(new)):
        union = frozenset().union(*(labels[i] for i in sources if old[i] > 1))
        union = union or frozenset().union(*(labels[i] for i in sources))
        for target in targets:
            out[target] = union if new[target] > 1 or len(targets) == 1 else frozenset()
    return tuple(out)
