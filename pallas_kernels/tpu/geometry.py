"""How a product is cut into blocks that fit a TPU's vector memory.

The grid is (blocks of rows, blocks of columns, blocks of K), K innermost, so that a
sum stays in a scratch array. A weight is always a stack ``[L, K, N]``; which of its
matrices is read is a scalar that is there before the kernel starts (scalar prefetch),
so no matrix is ever sliced out of the stack. Rows and K of the activation are padded,
which is cheap; the weight never is: the last block hangs over its edge, columns beyond
it are not written, and rows beyond it are masked.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
ROWS = 16  # bfloat16 rows of a register
STEP_ROWS = 256  # rows of a weight whose work takes as long as what each step adds


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block sizes, at most: rows and columns of the result, and rows of the weight."""

    m: int
    n: int
    k: int


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The blocks of one product.

    Attributes:
        rows: M.
        inner: K of the weight.
        columns: N.
        group: rows per scale.
        m: rows per block.
        n: columns per block.
        k: rows of the weight per block: all of them, or a multiple of 8 groups.
    """

    rows: int
    inner: int
    columns: int
    group: int
    m: int
    n: int
    k: int

    @classmethod
    def of(cls, x: jax.Array, codes: jax.Array, group: int, tile: Tile) -> "Geometry":
        """Fit a tile to ``x[M, K]`` and ``codes[L, K', N]``, ``K ≤ K'``."""
        rows, (inner, columns) = x.shape[0], codes.shape[-2:]
        group = min(group, inner)
        unit = LANES if group == inner else math.lcm(SUBLANES * group, LANES)
        m = min(tile.m, _up(rows, ROWS))
        n = columns if columns <= tile.n else _even_block(columns, tile.n)
        return cls(rows, inner, columns, group, m, n, _inner_block(inner, tile.k, unit))

    @property
    def grouped(self) -> bool:
        """Whether a column has several scales."""
        return self.group < self.inner

    @property
    def groups(self) -> int:
        """The scales of a column in one block."""
        return -(-self.k // self.group) if self.grouped else 1

    @property
    def steps(self) -> int:
        """The blocks of K."""
        return -(-self.inner // self.k)

    @property
    def ragged(self) -> bool:
        """Whether the last block of K hangs over the edge."""
        return self.inner % self.k != 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid."""
        return -(-self.rows // self.m), -(-self.columns // self.n), self.steps

    def padded(self, x: jax.Array) -> jax.Array:
        """Return ``x`` with zeros up to whole blocks of K, and some rows."""
        rows = max(_up(self.rows, ROWS), self.m)
        shape = rows, self.steps * self.k
        pads = [(0, n - have) for n, have in zip(shape, x.shape, strict=True)]
        return jnp.pad(x, pads)

    def group_sums(self, x: jax.Array) -> jax.Array:
        """Return the sums over groups of padded ``x``: ``[steps, M, groups]``."""
        size = self.group if self.grouped else self.k
        parts = x.astype(jnp.float32).reshape(x.shape[0], self.steps, self.k)
        parts = jnp.pad(parts, ((0, 0), (0, 0), (0, self.groups * size - self.k)))
        sums = jnp.sum(parts.reshape(*parts.shape[:2], self.groups, size), -1)
        return jnp.swapaxes(sums, 0, 1)

    def rows_left(self) -> jax.Array:
        """Inside a kernel: how many rows of the weight this block of K really has."""
        return self.inner - pl.program_id(2) * self.k

    def masked(self, values: jax.Array, size: int) -> jax.Array:
        """Inside a kernel: ``values[k / size, n]``, 0 for rows over the edge."""
        if not self.ragged:
            return values
        row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) * size
        return jnp.where(row < self.rows_left(), values, jnp.zeros_like(values))

    # ---- block specs; a kernel's index maps also get the layer

    def x_spec(self) -> pl.BlockSpec:
        """Blocks of ``[M, K]``."""
        return pl.BlockSpec((self.m, self.k), lambda i, j, k, layer: (i, k))

    def codes_spec(self) -> pl.BlockSpec:
        """Blocks of ``[L, K, N]``."""
        index = lambda i, j, k, layer: (layer[0], k, j)
        return pl.BlockSpec((None, self.k, self.n), index)

    def scales_spec(self) -> pl.BlockSpec:
        """Blocks of ``[L, groups, N]``."""
        if self.grouped:
            index = lambda i, j, k, layer: (layer[0], k, j)
        else:
            index = lambda i, j, k, layer: (layer[0], 0, j)
        return pl.BlockSpec((None, self.groups, self.n), index)

    def sums_spec(self) -> pl.BlockSpec:
        """Blocks of ``[steps, M, groups]``."""
        index = lambda i, j, k, layer: (k, i, 0)
        return pl.BlockSpec((None, self.m, self.groups), index)

    def row_spec(self) -> pl.BlockSpec:
        """Blocks of ``[M, 1]``."""
        return pl.BlockSpec((self.m, 1), lambda i, j, k, layer: (i, 0))

    def bias_spec(self) -> pl.BlockSpec:
        """Blocks of ``[1, N]``."""
        return pl.BlockSpec((1, self.n), lambda i, j, k, layer: (0, j))

    def out_spec(self) -> pl.BlockSpec:
        """Blocks of ``[M, N]``."""
        return pl.BlockSpec((self.m, self.n), lambda i, j, k, layer: (i, j))

    def call(
        self,
        body: Callable[..., None],
        layer: jax.Array,
        operands: Sequence[tuple[pl.BlockSpec, jax.Array]],
        out_dtype: Any,
        scratch: Sequence[Any],
        interpret: Any,
        semantics: Sequence[Any] = ("parallel", "parallel", "arbitrary"),
    ) -> jax.Array:
        """Run ``body(layer, *blocks, out, *scratch)`` over the grid: ``[M, N]``."""
        specs, arrays = zip(*operands, strict=True)
        rows = arrays[0].shape[0]
        y = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.grid,
                in_specs=list(specs),
                out_specs=self.out_spec(),
                scratch_shapes=list(scratch),
            ),
            out_shape=jax.ShapeDtypeStruct((rows, self.columns), out_dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=list(semantics)),
            cost_estimate=self._cost(arrays, rows * self.columns, out_dtype),
            interpret=interpret,
        )(layer, *arrays)
        return y[: self.rows]

    def _cost(
        self, arrays: Sequence[jax.Array], results: int, out_dtype: Any
    ) -> pl.CostEstimate:
        """Tell XLA's scheduler what to expect: one layer's bytes, not the stack's."""
        bits = sum(
            math.prod(a.shape[1:] if a.ndim == 3 else a.shape) * _bits(a.dtype)
            for a in arrays
        )
        return pl.CostEstimate(
            flops=2 * self.rows * self.inner * self.columns,
            bytes_accessed=(bits + results * _bits(out_dtype)) // 8,
            transcendentals=0,
        )


def stacked(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Return a weight as a stack and a layer, its scales one per column."""
    if layer is None:
        codes, scales = codes[None], scales[None]
        zeros = None if zeros is None else zeros[None]
        layer = jnp.int32(0)
    columns = codes.shape[-1]

    def wide(a: jax.Array) -> jax.Array:
        return jnp.broadcast_to(a, (*a.shape[:-1], columns))

    zeros = None if zeros is None else wide(zeros)
    return codes, wide(scales), zeros, jnp.reshape(layer, 1).astype(jnp.int32)


def _inner_block(inner: int, most: int, unit: int) -> int:
    """Return rows per block: all, or the multiple of ``unit`` that costs least.

    A step costs its rows, those over the edge too, and as much as `STEP_ROWS` more.
    """
    if inner <= most * 3 // 2 or most < unit:
        return inner
    blocks = range(unit, most + 1, unit)
    return min(reversed(blocks), key=lambda k: -(-inner // k) * (k + STEP_ROWS))


def _even_block(columns: int, most: int) -> int:
    """Return columns per block: as many blocks as needed, all about as wide."""
    return _up(-(-columns // -(-columns // most)), LANES)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _bits(dtype: Any) -> int:
    return (
        jnp.finfo(dtype).bits
        if jnp.issubdtype(dtype, jnp.floating)
        else (jnp.iinfo(dtype).bits)
    )
