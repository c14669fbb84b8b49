"""What becomes of a Triton kernel's sums: units of rows, bias, activation, a dtype."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.epilogue import finished
from pallas_kernels.gpu.triton_grid import Cut, Part

# from sums ``[columns, rows]`` and references to more to what is written
Ending = Callable[[jax.Array, Sequence[Any]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a product: ``f(y · units + bias)``.

    Attributes:
        dtype: of the result.
        units: float32 ``[M]``, or None.
        bias: ``[N]``, or None.
        epilogue: a key of `pallas_kernels.epilogue.ACTIVATIONS`.
    """

    dtype: Any
    units: jax.Array | None = None
    bias: jax.Array | None = None
    epilogue: str | None = None

    def run(
        self,
        cut: Cut,
        body: Callable[..., None],
        arrays: list[jax.Array],
        size: tuple[int, int, int],
        interpret: bool,
    ) -> jax.Array:
        """Return the finished result of a kernel.

        Its thread blocks finish it where they sum all there is: else XLA does.

        Args:
            cut: the sizes.
            body: the kernel, of its `Ending` and what `Cut.call` gives it.
            arrays: its operands.
            size: addends of the result, its rows, and its columns.
            interpret: whether to run on a CPU.
        """
        parts, rows, columns = size
        tile = cut.tile
        if parts == 1 and tile.splits == 1:
            whole = jax.ShapeDtypeStruct((cut.rows, cut.columns), self.dtype)
            spec = pl.BlockSpec((tile.rows, tile.columns), lambda j, i, q: (i, j))
            ending, more = functools.partial(body, self._inside), self._operands(cut)
            y = cut.call(ending, arrays, list(more), Part(whole, spec), interpret)
            return y[:rows, :columns]
        shape = (tile.splits, cut.columns, cut.rows)
        spec = pl.BlockSpec((None, tile.columns, tile.rows), lambda j, i, q: (q, j, i))
        out = Part(jax.ShapeDtypeStruct(shape, jnp.float32), spec)
        sums = functools.partial(body, lambda y, _: y)
        y = jnp.sum(cut.call(sums, arrays, [], out, interpret), axis=0)
        y = y[:columns, : parts * rows].T.reshape(parts, rows, columns)
        return self._outside(jnp.sum(y, axis=0))

    def _operands(self, cut: Cut) -> Iterator[Part]:
        """Yield what `_inside` reads, whole tiles of it."""
        if self.units is not None:
            units = jnp.pad(self.units, (0, cut.rows - self.units.shape[0]))
            yield Part(units, pl.BlockSpec((cut.tile.rows,), lambda j, i, q: (i,)))
        if self.bias is not None:
            bias = self.bias.astype(jnp.float32)
            bias = jnp.pad(bias, (0, cut.columns - bias.shape[0]))
            yield Part(bias, pl.BlockSpec((cut.tile.columns,), lambda j, i, q: (j,)))

    def _inside(self, total: jax.Array, more: Sequence[Any]) -> jax.Array:
        """Return a tile ``[rows, columns]`` of the result from its sums."""
        if self.units is not None:
            total = total * more[0][...][None]
        bias = None if self.bias is None else more[-1][...][:, None]
        return finished(total, bias, self.epilogue).astype(self.dtype).T

    def _outside(self, total: jax.Array) -> jax.Array:
        """Return the result ``[M, N]`` from its sums, in XLA."""
        if self.units is not None:
            total = total * self.units[:, None]
        return finished(total, self.bias, self.epilogue).astype(self.dtype)
