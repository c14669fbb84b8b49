"""A weight of any rank as a matrix ``[K, N]``: contracted elements by free ones."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.blocks import block_axes, grid_shape, spread, to_blocks
from jaxq.quantize import Axes, Blocking
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """Where the elements and blocks of one weight lie in its matrix.

    Rows are the ``K`` contracted elements, in the order of ascending contracted axes
    (that of a Gram matrix); columns the ``N`` free ones. Every block is a range of rows
    (a *row group*) by a product of ranges of free axes, so that scales are ``[R, N]``
    once they are spread over the columns.

    Attributes:
        shape: of the weight.
        where: its blocks; no axis is stacked.
    """

    shape: tuple[int, ...]
    where: Blocking

    @classmethod
    def of(cls, shape: Sequence[int], spec: QuantSpec, axis: Axes) -> "MatrixView":
        """Return the view of a weight of ``shape`` that contracts ``axis``."""
        return cls(tuple(shape), Blocking.of(spec, shape, axis))

    @property
    def contracted(self) -> tuple[int, ...]:
        """The lengths of the contracted axes."""
        return tuple(self.shape[a] for a in self.where.contracting)

    @property
    def free(self) -> tuple[int, ...]:
        """The lengths of the free axes."""
        return tuple(self.shape[a] for a in self._free_axes)

    @property
    def free_block(self) -> tuple[int, ...]:
        """The block sizes along the free axes."""
        return tuple(self.where.block[a] for a in self._free_axes)

    @property
    def rows(self) -> int:
        """``K``, the contracted elements."""
        return math.prod(self.contracted)

    @property
    def columns(self) -> int:
        """``N``, the free elements."""
        return math.prod(self.free)

    @functools.cached_property
    def row_groups(self) -> np.ndarray:
        """The row group of every row, ``int32[K]``, ascending."""
        sizes = [self.where.block[a] for a in self.where.contracting]
        places = np.indices(self.contracted)
        places = [p // size for p, size in zip(places, sizes, strict=True)]
        grid = grid_shape(self.contracted, sizes)
        return np.ravel_multi_index(places, grid).reshape(-1).astype(np.int32)

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """The rows of every row group, ``int32[R, G]``; ``K`` fills ragged groups."""
        counts = np.bincount(self.row_groups)
        size = counts.max()
        # spans inside a large group need sizes that divide it
        size += -size % 8 if size > 32 else 0
        out = np.full((len(counts), size), self.rows, np.int32)
        starts = np.cumsum(counts) - counts
        places = np.arange(self.rows)
        out[self.row_groups, places - starts[self.row_groups]] = places
        return out

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """Return an array of the weight's layout as ``[K, N]``."""
        return x.transpose(self._axes).reshape(self.rows, self.columns)

    def from_matrix(self, x: jax.Array) -> jax.Array:
        """Invert `to_matrix`."""
        return x.reshape(self.contracted + self.free).transpose(np.argsort(self._axes))

    def to_groups(self, rows: jax.Array) -> jax.Array:
        """Return ``[K, ...]`` as ``[R, G, ...]``; ragged groups end in zeros."""
        groups, size = self.slots.shape
        if groups * size == self.rows:
            return rows.reshape(groups, size, *rows.shape[1:])
        return jnp.take(rows, self.slots, axis=0, mode="fill", fill_value=0)

    def unfold(self, groups: jax.Array) -> jax.Array:
        """Return groups ``[R, G, N]`` with the free axes apart: ``[R, G, *free]``."""
        return groups.reshape(*groups.shape[:-1], *self.free)

    def grid_to_groups(self, grid: jax.Array) -> jax.Array:
        """Return one value per block in the weight's layout as ``[R, N]``."""
        x = grid.transpose(self._axes)
        x = x.reshape(len(self.slots), *x.shape[len(self.where.contracting) :])
        return spread_columns(x, self)

    def columns_to_grid(self, x: jax.Array) -> jax.Array:
        """Invert `grid_to_groups`."""
        x = x.reshape(len(x), *self.free)
        for axis, size in enumerate(self.free_block, 1):
            x = jax.lax.slice_in_dim(x, 0, x.shape[axis], size, axis)
        return self.groups_to_grid(x)

    def groups_to_grid(self, x: jax.Array) -> jax.Array:
        """Return one value per block, ``[R, *free blocks]``, in the weight's layout."""
        grid = grid_shape(self.shape, self.where.block)
        return x.reshape([grid[a] for a in self._axes]).transpose(
            np.argsort(self._axes)
        )

    def sum_columns(self, x: jax.Array) -> jax.Array:
        """Return ``[N]`` summed over the columns of a block, spread over them again."""
        if self.free_block == (1,) * len(self.free):
            return x
        blocks = to_blocks(x.reshape(self.free), self.free_block)
        return spread_columns(jnp.sum(blocks, block_axes(len(self.free))), self)

    def gram_blocks(self, gram: jax.Array) -> jax.Array:
        """Return the diagonal blocks ``[R, G, G]`` of ``[K, K]`` that groups meet."""
        slots = jnp.asarray(self.slots)
        pick = lambda s: jnp.take(
            jnp.take(gram, s, axis=0, mode="fill", fill_value=0),
            s,
            axis=1,
            mode="fill",
            fill_value=0,
        )
        return jax.lax.map(pick, slots)

    def check_square(self, name: str, x: jax.Array) -> None:
        """Raise unless a statistic has one row and column per contracted element.

        Raises:
            ValueError: naming its shape, and the one it should have.
        """
        if x.shape != (self.rows, self.rows):
            raise ValueError(
                f"{name} of one weight has shape {x.shape}, but the weight of shape "
                f"{self.shape} contracts {self.rows} elements: give "
                f"[*stack, {self.rows}, {self.rows}]"
            )

    @property
    def _free_axes(self) -> tuple[int, ...]:
        """The axes that are not contracted, ascending."""
        axes = range(len(self.shape))
        return tuple(a for a in axes if a not in self.where.contracting)

    @property
    def _axes(self) -> tuple[int, ...]:
        """Contracted axes first, then the free ones."""
        return self.where.contracting + self._free_axes


def spread_columns(x: jax.Array, view: MatrixView) -> jax.Array:
    """Repeat ``[..., *free blocks]`` over the columns: ``[..., N]``."""
    lead = x.shape[: x.ndim - len(view.free)]
    block = (1,) * len(lead) + view.free_block
    x = spread(x, block, lead + view.free)
    return jnp.broadcast_to(x, lead + view.free).reshape(*lead, view.columns)
