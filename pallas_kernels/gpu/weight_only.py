"""Float activations times packed weights, for few rows: scales on partial sums.

Operands are swapped: a warpgroup unpacks 64 columns of the weight into registers, which
are the left operand of ``wgmma``; the activation is the right one, out of shared
memory. So a weight is unpacked once, by the thread that multiplies it, and is an exact
integer (or a number of its format) in bfloat16. The scale meets the partial sum of its
group in float32: nothing is rounded but the activation, which is bfloat16 or float16
anyway. float32 activations are cut into two bfloat16 parts (three when precise), which
are more rows of the same product.

One warpgroup copies tiles with the TMA engine, through a ring of buffers; the others
compute. Where one thread block sums all of K for 16-bit floats, the kernel adds the
bias, applies the activation and writes the result itself; else XLA does, in one fusion
with the sum of the parts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.epilogue import finished
from pallas_kernels.gpu.cases import FP4, FP8, INT8, NF4, UINT8, Case, signed, unsigned
from pallas_kernels.gpu.finish import Finish
from pallas_kernels.gpu.geometry import Geometry, cannot_cut
from pallas_kernels.gpu.layout import words_of
from pallas_kernels.gpu.mosaic import (
    PARAMS,
    ROWS,
    Mode,
    per_group,
    pipeline,
    swizzled,
    wide,
)
from pallas_kernels.gpu.operands import operands
from pallas_kernels.gpu.rounding import MOST, Rows, scaled_input
from pallas_kernels.gpu.unpack import Floats
from pallas_kernels.kernel import Coding, Kernel, Operands, Problem, TileRow
from pallas_kernels.target import generations

ANY = 1 << 30


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the product is cut.

    Attributes:
        rows: rows of the activation per thread block, at most.
        warpgroups: that compute; each takes 64 columns.
        inner: rows of the weight per step, at least.
        stages: buffers in the ring.
        splits: parts of K that different thread blocks sum.
        columns: per warpgroup.
    """

    rows: int = 32
    warpgroups: int = 2
    inner: int = 128
    stages: int = 6
    splits: int = 1
    columns: int = ROWS


def weight_only(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    coding: Coding,
    group: int,
    tile: Tile,
    parts: int = 2,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: DTypeLike | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Return ``f((x · input_scale) @ ((value(codes) − zeros) · scales) + bias)``.

    Args:
        x: ``[M, K']``, bfloat16, float16 or float32, K' ≤ K.
        codes: uint16 ``[slabs, 32 N]`` (see `layout`), ``[L, ...]`` with a layer.
        scales: float ``[groups, N]``; groups and N may be 1.
        zeros: integers like ``scales``, or None.
        layer: int32 scalar, or None.
        coding: what codes stand for.
        group: rows per scale.
        tile: how to cut.
        parts: bfloat16 parts of a float32 activation.
        bias: ``[N]``, or None.
        input_scale: ``[K']``, or None; XLA scales ``x``, which keeps its dtype.
        epilogue: a key of `pallas_kernels.epilogue.ACTIVATIONS`.
        out_dtype: of the result; that of ``x`` by default.
        interpret: ``InterpretGPUParams`` to run on a CPU.

    Returns:
        ``[M, N]``.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    rows, columns = x.shape[0], codes.shape[-1] // 32
    x = split(scaled_input(x, input_scale), parts)
    g = Geometry.of(x.shape[0], codes, scales.shape[-2], coding, group, tile, (2, 4))
    direct = g.splits == 1 and out_dtype.itemsize == 2 and rows == x.shape[0]
    finish = Finish(bias is not None, epilogue) if direct else Finish()
    dtype = out_dtype if direct else jnp.dtype(jnp.float32)
    arrays = [
        jnp.pad(x, ((0, g.padded_rows - x.shape[0]), (0, g.inner - x.shape[1]))),
        words_of(codes, g.columns),
        wide(per_group(scales, layer, g.inner, g.group), columns, g.columns),
    ]
    if zeros is not None:
        arrays.append(
            wide(per_group(zeros, layer, g.inner, g.group), columns, g.columns)
        )
    arrays += finish.operands(bias, g.columns)
    index = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    floats = Floats(coding, x.dtype.name, zeros is not None)
    body = functools.partial(_kernel, g, floats, finish, dtype, interpret)
    lead, buffer = ((), (g.rows, ROWS)) if direct else ((g.splits,), (ROWS, g.rows))
    shape = (g.padded_rows, g.columns) if direct else (g.columns, g.padded_rows)
    transforms = swizzled(16) if direct else ()
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*lead, *shape), dtype),
        grid=(g.column_tiles, g.row_tiles, g.splits),
        grid_names=("n", "m", "k"),
        num_threads=g.warpgroups + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        scratch_types={
            "buffer": plgpu.SMEM((g.warpgroups, *buffer), dtype, transforms=transforms),
            **finish.scratch(g.tile_columns),
        },
        interpret=interpret,
    )(*arrays, index)
    if direct:
        return y[:rows, :columns]
    y = jnp.sum(y, axis=0).T[: x.shape[0], :columns].reshape(-1, rows, columns)
    return finished(jnp.sum(y, axis=0), bias, epilogue).astype(out_dtype)


def split(x: jax.Array, parts: int) -> jax.Array:
    """Return float32 ``x[M, K]`` as bfloat16 ``[parts · M, K]`` that add up to it."""
    if x.dtype != jnp.float32:
        return x
    found = []
    for _ in range(parts):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return jnp.concatenate(found)


def _kernel(
    g: Geometry,
    floats: Floats,
    finish: Finish,
    dtype: Any,
    interpret: Any,
    x: Any,
    codes: Any,
    scales: Any,
    *rest: Any,
    buffer: Any,
    kept: Any = None,
) -> None:
    """Sum one tile ``[columns, rows]`` of the result over K, and write it."""
    *given, index, out = rest
    zeros, bias = finish.parted(given)
    mode = Mode(interpret)
    layer = index[0]
    wg, n, m, k = (lax.axis_index(name) for name in ("wg", "n", "m", "k"))
    here = pl.ds(wg * ROWS, ROWS)

    def step(_: Any, w: Any, x: Any, s: Any, *more: Any) -> jax.Array:
        *z, total = more
        operand = operands(g, floats, mode, w, z, here)
        count = g.run // g.operand
        for i in range(g.scales):
            # unpacked before the sum's scope: the next group may share a table's words
            mine = [operand(j) for j in range(i * count, (i + 1) * count)]
            add = functools.partial(_accumulate, g, mode, mine, x, i * count)
            part = mode.partial((ROWS, g.rows), jnp.float32, add)
            scale = mode.per_row(s.at[i, here], part.shape, jnp.float32)
            total = total + part * scale
        mode.release()
        return total

    def write(total: jax.Array) -> None:
        columns = pl.ds(n * g.tile_columns + wg * ROWS, ROWS)
        rows = pl.ds(m * g.rows, g.rows)
        target = out if dtype.itemsize == 2 else out.at[k]
        finish.wait(kept)
        y = finish(mode, total, kept, here).astype(dtype)
        mode.write(buffer.at[wg], y, target, rows, columns)

    @pl.when(wg == g.warpgroups)
    def _() -> None:
        columns = pl.ds(n * g.tile_columns, g.tile_columns)
        finish.fetch(bias, kept, columns)

    tile_scales = plgpu.BlockSpec(
        (g.scales, g.tile_columns), lambda i: (g.scales_of(layer, k, i), n)
    )
    words = plgpu.BlockSpec(
        (g.slabs, g.tile_columns, 32),
        lambda i: (g.step_of(layer, k, i), n, 0),
        transforms=swizzled(16, 64),
    )
    rows = plgpu.BlockSpec(
        (g.rows, g.step),
        lambda i: (m, k * g.steps + i),
        transforms=swizzled(16, 2 * g.operand),
    )
    pipeline(
        step,
        grid=(g.steps,),
        in_specs=[words, rows, tile_scales, *[tile_scales for _ in zeros]],
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=g.warpgroups,
        max_concurrent_steps=g.stages,
        compute_context=mode.carried((ROWS, g.rows), write),
    )(codes, x, scales, *zeros)
    mode.also(wg == g.warpgroups, lambda: finish.wait(kept))


def _accumulate(
    g: Geometry, mode: Mode, mine: list[jax.Array], x: Any, first: int, total: Any
) -> None:
    """Add the products of some operands, of which ``first`` is the first."""
    for i, left in enumerate(mine):
        right = x.at[:, pl.ds((first + i) * g.operand, g.operand)]
        mode.multiply(total, left, right, 0 if i == len(mine) - 1 else None)


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    if p.coding.kind == "table" and p.coding.bits != 4:
        return f"a table of {2**p.coding.bits} numbers; registers hold 16"
    return weight_only_declines(p)


def weight_only_declines(p: Problem) -> str | None:
    """Return why no weight-only kernel takes a problem, or None."""
    if p.rows == 0:
        return "there are no rows"
    if p.activation not in (None, *MOST):
        return f"the activation is rounded to {p.activation}"
    if p.coding.kind == "table" and p.coding.bits not in (4, 8):
        return f"a table of {2**p.coding.bits} numbers; 16 or 256 can be looked up"
    return cannot_cut(p)


TILES = (
    TileRow("sm_90", 8, Tile(8, 2, 256, 6)),
    TileRow("sm_90", 16, Tile(16, 2, 256, 6)),
    TileRow("sm_90", 32, Tile(32, 2, 512, 3)),
    TileRow("sm_90", ANY, Tile(64, 2, 128, 5)),
    TileRow("sm_90", ANY, Tile(8, 2, 128, 8)),
    TileRow("sm_90", ANY, Tile(16, 1, 256, 8)),
    TileRow("sm_90", ANY, Tile(16, 4, 256, 4)),
    TileRow("sm_90", ANY, Tile(16, 2, 256, 6, splits=2)),
    TileRow("sm_90", ANY, Tile(16, 2, 256, 6, splits=4)),
    TileRow("sm_90", ANY, Tile(32, 4, 256, 3, splits=2)),
)

CASES = (
    Case("w4 g128", 16, 512, 128, signed(4), 128),
    Case("w4 channel, 1 row", 1, 256, 64, signed(4)),
    Case("w4 g128 zeros", 8, 512, 128, unsigned(4), 128, zeros=True),
    Case("w4 g64 zeros, float16", 5, 256, 128, signed(4), 64, True, dtype="float16"),
    Case("w4 g32, stacked, float32", 3, 256, 64, signed(4), 32, True, 3, "float32"),
    Case("w4 g256", 4, 512, 64, signed(4), 256),
    Case("w3 g128, stacked", 9, 1024, 64, signed(3), 128, layers=2),
    Case("w2 g64 zeros", 8, 512, 64, unsigned(2), 64, zeros=True),
    Case("w8 channel", 8, 256, 64, INT8),
    Case("w8 g64 zeros, float16", 8, 256, 64, INT8, 64, True, dtype="float16"),
    Case("uint8 g128 zeros", 8, 256, 64, UINT8, 128, zeros=True),
    Case("nf4 g64", 16, 256, 128, NF4, 64),
    Case("fp4 g32", 2, 256, 64, FP4, 32),
    Case("fp8 channel", 8, 128, 64, FP8),
    Case("w4a8 g32", 5, 256, 64, signed(4), 32, activation="int8"),
    Case("fp8 x int4 g64", 5, 256, 64, signed(4), 64, activation="float8_e4m3fn"),
    Case("w4 g32 zeros, odd K, stacked", 5, 328, 64, signed(4, 8), 32, True, 2),
    Case("w3 channel, odd K", 3, 200, 64, signed(3, 8)),
    Case("fp8 g64, odd K", 3, 200, 64, FP8, 64),
    Case("w4 g128, odd rows and columns", 37, 256, 200, signed(4), 128, zeros=True),
)


def run(
    p: Problem, a: Operands, tile: Tile, interpret: Any, **options: Any
) -> jax.Array:
    """Run on the operands of a problem, with the function's other options."""
    rows = Rows.of(p, a, **options)
    y = weight_only(
        rows.x,
        a.codes,
        a.scales,
        a.zeros,
        a.layer,
        coding=p.coding,
        group=p.group,
        tile=tile,
        parts=3 if p.precise else 2,
        interpret=interpret or None,
        **rows.options,
    )
    return rows.finished(y)


KERNEL = Kernel(
    "gpu.weight_only", "gpu", generations("gpu", "mosaic"), "gpu", declines, run, TILES
)
