"""How a product is cut for Pallas-Triton, and what its kernels share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.gpu.geometry import cannot_group, up
from pallas_kernels.gpu.layout import Block, matrix
from pallas_kernels.kernel import Coding

LEAST = 16  # rows and columns of a matrix product in Triton, at least


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the product is cut.

    Attributes:
        rows: rows of the activation per thread block: 16 · 2^n.
        columns: of the weight per thread block: 16 · 2^n.
        splits: parts of K that different thread blocks sum.
        warps: per thread block.
        stages: of Triton's pipeline.
    """

    rows: int = 16
    columns: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 4


class Part(NamedTuple):
    """An array, and what of it a thread block gets: of columns j, rows i, and split q.

    Attributes:
        whole: the array; only its shape, for a result.
        spec: of the part.
    """

    whole: Any
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Cut:
    """The static sizes of one product.

    Attributes:
        block: of the weight's rows; a step takes one.
        inner: K of the weight.
        columns: N, whole tiles of them.
        group: rows per scale; K when a column has one.
        groups: scales per column.
        rows: M, whole tiles of them.
        tile: how to cut.
    """

    block: Block
    inner: int
    columns: int
    group: int
    groups: int
    rows: int
    tile: Tile

    @classmethod
    def of(
        cls,
        rows: int,
        codes: jax.Array,
        groups: int,
        coding: Coding,
        group: int,
        tile: Tile,
    ) -> "Cut":
        """Fit a tile.

        Raises:
            ValueError: when groups do not divide K, or are not of 32 · 2^n rows.
        """
        inner, columns = matrix(codes.shape, coding)
        group = inner if groups == 1 else group
        if (reason := cannot_group(inner, group)) is not None:
            raise ValueError(reason)
        groups = inner // group  # with those that only fill up the last block
        block = Block(coding.bits)
        splits = math.gcd(inner // block.rows, tile.splits)
        tile = dataclasses.replace(tile, splits=splits)
        whole = up(columns, tile.columns)
        return cls(block, inner, whole, group, groups, up(rows, tile.rows), tile)

    @property
    def steps(self) -> int:
        """Blocks of K that a thread block sums."""
        return self.inner // self.block.rows // self.tile.splits

    @property
    def run(self) -> int:
        """Rows of a block that share a scale."""
        return min(self.group, self.block.rows)

    def scale_of(self, layer: Any, block: Any, run: int) -> Any:
        """Return the row of all scales that a run of a block has."""
        if self.groups == 1:
            return layer
        row = (block * self.block.rows + run * self.run) // self.group
        return layer * self.groups + row

    def whole(self, x: jax.Array) -> jax.Array:
        """Return ``x[M, K']`` with zeros up to whole tiles and all of K."""
        down, right = self.rows - x.shape[0], self.inner - x.shape[1]
        return jnp.pad(x, ((0, down), (0, right)))

    def call(
        self,
        body: Callable[..., None],
        arrays: list[jax.Array],
        more: list[Part],
        out: Part,
        interpret: bool,
    ) -> jax.Array:
        """Run a kernel.

        Args:
            body: of references to ``arrays``, and by name ``more`` and ``out``.
            arrays: the activation, then ``[..., N, c]``, ``[..., N]``, or what a
                thread block gets all of, ``[n]``.
            more: operands that a tile is finished with, and what of them it gets.
            out: the result, and what a thread block writes of it.
            interpret: whether to run on a CPU.
        """
        tile, count = self.tile, len(arrays)
        specs = [pl.BlockSpec((tile.rows, self.inner), lambda j, i, q: (i, 0))]
        for a in arrays[1:]:
            size = (a.shape[0], tile.columns, *a.shape[2:])[: a.ndim]
            specs.append(pl.BlockSpec(size, _column_tile(a.ndim)))
        specs += [part.spec for part in more]
        grid = self.columns // tile.columns, self.rows // tile.rows, tile.splits
        return pl.pallas_call(
            lambda *refs: body(*refs[:count], more=refs[count:-1], out=refs[-1]),
            grid=grid,
            in_specs=specs,
            out_specs=out.spec,
            out_shape=out.whole,
            compiler_params=triton.CompilerParams(
                num_warps=tile.warps, num_stages=tile.stages
            ),
            interpret=interpret,
        )(*arrays, *(part.whole for part in more))


def _column_tile(rank: int) -> Callable[..., tuple[Any, ...]]:
    return lambda j, i, q: (0, j, 0)[:rank]


def by_rows(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Return ``a @ b.T``."""
    sides = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, sides, preferred_element_type=dtype)
