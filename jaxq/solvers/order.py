"""The order in which GPTQ rounds rows."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.solvers.matrix import MatrixView


@dataclasses.dataclass(frozen=True)
class Order:
    """Rows in the order of rounding, filled up to whole blocks.

    Attributes:
        rows: how many there are, ``K``.
        places: ``int32[K']``, the row at every place; ``K`` where a place only fills a
            block. None: the natural order, filled at the end.
        groups: ``int32[K']``, the row group of every place.
    """

    rows: int
    places: jax.Array | np.ndarray | None
    groups: jax.Array | np.ndarray

    @property
    def length(self) -> int:
        """``K'``, the places."""
        return len(self.groups)

    def take(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """Return ``x`` with its ``K`` rows in this order; zeros fill."""
        if self.places is not None:
            if self.length == self.rows:
                return jnp.take(x, self.places, axis=axis, mode="clip")
            return jnp.take(x, self.places, axis=axis, mode="fill", fill_value=0)
        pad = [(0, self.length - self.rows if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, pad)

    def back(self, x: jax.Array) -> jax.Array:
        """Invert `take` along the first axis."""
        if self.places is None:
            return lax.slice_in_dim(x, 0, self.rows)
        return jnp.take(x, jnp.argsort(self.places)[: self.rows], axis=0)

    def filling(self) -> jax.Array:
        """Return which places hold no row, ``bool[K']``."""
        if self.places is None:
            return jnp.arange(self.length) >= self.rows
        return jnp.asarray(self.places) == self.rows


def natural(view: MatrixView, diagonal: jax.Array, block: int) -> Order:
    """Return the rows as they are."""
    fill = -view.rows % block
    return Order(view.rows, None, np.pad(view.row_groups, (0, fill)))


def activation(view: MatrixView, diagonal: jax.Array, block: int) -> Order:
    """Return the rows by descending activation, the diagonal of the Hessian."""
    places = jnp.argsort(-diagonal, stable=True).astype(jnp.int32)
    return _filled(view, places, block)


def group(view: MatrixView, diagonal: jax.Array, block: int) -> Order:
    """Return whole groups by their largest activation, and rows likewise in each.

    A row stays beside the others of its group, so that scales may be chosen when a
    group begins (GPTQModel's group-aware reordering).
    """
    groups = jnp.asarray(view.row_groups)
    largest = jax.ops.segment_max(diagonal, groups, len(view.slots))
    keys = (-diagonal, groups, -largest[groups])
    return _filled(view, jnp.lexsort(keys).astype(jnp.int32), block)


def by_slots(order: Order, view: MatrixView, block: int) -> Order:
    """Return an order of whole groups with every group filled up to the largest.

    So groups begin at multiples of one size, also where some are ragged.

    Args:
        order: natural, or by groups.
        view: the weight's rows and groups.
        block: places per block, a multiple of the largest group.
    """
    count, size = view.slots.shape
    fill = -(count * size) % block // size
    if order.places is None and count * size == view.rows:
        return Order(view.rows, None, np.repeat(np.arange(count + fill), size))
    rows = np.arange(view.rows) if order.places is None else order.places
    rows = jnp.asarray(rows)[: view.rows]
    groups = jnp.asarray(view.row_groups)[rows]
    starts = jnp.concatenate([jnp.asarray([True]), groups[1:] != groups[:-1]])
    first = lax.cummax(jnp.where(starts, jnp.arange(view.rows), 0))
    slot = (jnp.cumsum(starts) - 1) * size + jnp.arange(view.rows) - first
    places = jnp.full((count + fill) * size, view.rows, jnp.int32)
    places = places.at[slot].set(rows.astype(jnp.int32))
    which = jnp.arange(count + fill).at[jnp.cumsum(starts) - 1].set(groups)
    return Order(view.rows, places, jnp.repeat(which, size).astype(jnp.int32))


def _filled(view: MatrixView, places: jax.Array, block: int) -> Order:
    """Return the order with its end filled up to whole blocks."""
    fill = -view.rows % block
    groups = jnp.pad(jnp.asarray(view.row_groups)[places], (0, fill))
    places = jnp.pad(places, (0, fill), constant_values=view.rows)
    return Order(view.rows, places, groups)


ORDERS: dict[str, Callable[[MatrixView, jax.Array, int], Order]] = {
    "activation": activation,
    "natural": natural,
    "group": group,
}
