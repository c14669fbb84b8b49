"""Float activations times packed weights, for many rows: scales on the weights.

The same layout and the same unpacking as `weight_only`, but the scale meets the weight
in its 16-bit dtype (two roundings), so that one accumulator runs through all of K: with
many rows the tensor cores are what is scarce. One product stays in flight while the
next operand is unpacked.
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

from pallas_kernels.gpu import weight_only
from pallas_kernels.gpu.cases import INT8, NF4, Case, signed, unsigned
from pallas_kernels.gpu.finish import Finish
from pallas_kernels.gpu.geometry import Geometry
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
from pallas_kernels.gpu.rounding import Rows, scaled_input
from pallas_kernels.gpu.unpack import Floats
from pallas_kernels.gpu.weight_only import ANY, Tile
from pallas_kernels.kernel import Coding, Kernel, Operands, Problem, TileRow
from pallas_kernels.target import generations

FEW_ROWS = 64  # up to here, scaling partial sums is cheap


def weight_only_prefill(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    coding: Coding,
    group: int,
    tile: Tile,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: DTypeLike | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Return `weight_only.weight_only`'s product, the weight rounded like ``x``.

    Args:
        x: ``[M, K']``, bfloat16 or float16, K' ≤ K.
        codes: uint16 ``[slabs, 32 N]`` (see `layout`), ``[L, ...]`` with a layer.
        scales: float ``[groups, N]``; groups and N may be 1.
        zeros: integers like ``scales``, or None.
        layer: int32 scalar, or None.
        coding: what codes stand for.
        group: rows per scale.
        tile: how to cut; K is not split.
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
    x = scaled_input(x, input_scale)
    size = out_dtype.itemsize
    g = Geometry.of(rows, codes, scales.shape[-2], coding, group, tile, (2, size))
    finish = Finish(bias is not None, epilogue)
    arrays = [
        jnp.pad(x, ((0, g.padded_rows - rows), (0, g.inner - x.shape[1]))),
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
    flip = size == 2  # see `Mode.write`
    buffer = (g.rows, ROWS) if flip else (ROWS, g.rows)
    shape = (g.padded_rows, g.columns) if flip else (g.columns, g.padded_rows)
    transforms = swizzled(16) if flip else ()
    y = plgpu.kernel(
        functools.partial(_kernel, g, floats, finish, out_dtype, interpret),
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(g.row_tiles, g.column_tiles),
        grid_names=("m", "n"),
        num_threads=g.warpgroups + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        scratch_types={
            "buffer": plgpu.SMEM(
                (g.warpgroups, *buffer), out_dtype, transforms=transforms
            ),
            **finish.scratch(g.tile_columns),
        },
        interpret=interpret,
    )(*arrays, index)
    return (y if flip else y.T)[:rows, :columns]


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
    wg, n, m = (lax.axis_index(name) for name in ("wg", "n", "m"))
    here = pl.ds(wg * g.each, g.each)
    count = g.step // g.operand

    def step(_: Any, w: Any, x: Any, s: Any, *more: Any) -> Any:
        *z, carry = more
        total = mode.sum_of(carry)
        operand = operands(g, floats, mode, w, z, here)
        for j in range(count):
            number = operand(j)
            scale = s.at[j * g.operand // g.run, here]
            number = number * mode.per_row(scale, number.shape, number.dtype)
            right = x.at[:, pl.ds(j * g.operand, g.operand)]
            mode.multiply(total, number, right, 1 if j < count - 1 else 0)
        mode.release()
        return mode.carry_of(total)

    def write(total: jax.Array) -> None:
        finish.wait(kept)
        for start in range(0, g.each, ROWS):
            mine = pl.ds(wg * g.each + start, ROWS)
            part = finish(mode, total[start : start + ROWS], kept, mine).astype(dtype)
            columns = pl.ds(n * g.tile_columns + wg * g.each + start, ROWS)
            mode.write(buffer.at[wg], part, out, pl.ds(m * g.rows, g.rows), columns)

    @pl.when(wg == g.warpgroups)
    def _() -> None:
        columns = pl.ds(n * g.tile_columns, g.tile_columns)
        finish.fetch(bias, kept, columns)

    pipeline(
        step,
        grid=(g.steps,),
        in_specs=_specs(g, layer, m, n, len(zeros)),
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=g.warpgroups,
        max_concurrent_steps=g.stages,
        compute_context=mode.accumulated((g.each, g.rows), jnp.float32, write),
    )(codes, x, scales, *zeros)
    mode.also(wg == g.warpgroups, lambda: finish.wait(kept))


def _specs(g: Geometry, layer: Any, m: Any, n: Any, zeros: int) -> list[Any]:
    """Return where a step's words, activation, scales and zero points are."""
    words = plgpu.BlockSpec(
        (g.slabs, g.tile_columns, 32),
        lambda i: (g.step_of(layer, 0, i), n, 0),
        transforms=swizzled(16, 64),
    )
    rows = plgpu.BlockSpec(
        (g.rows, g.step), lambda i: (m, i), transforms=swizzled(16, 2 * g.operand)
    )
    scales = plgpu.BlockSpec(
        (g.scales, g.tile_columns), lambda i: (g.scales_of(layer, 0, i), n)
    )
    return [words, rows, scales, *[scales] * zeros]


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    if p.rows <= FEW_ROWS:
        return f"{p.rows} rows: scaling partial sums is exact and as fast"
    if p.dtype == "float32" and p.activation is None:
        return "the activation is float32: weights would be rounded to bfloat16"
    if p.precise:
        return f"weights would be rounded to {p.dtype}"
    return weight_only.declines(p)


TILES = (
    TileRow("sm_90", 128, Tile(64, 2, 128, 4, columns=64)),
    TileRow("sm_90", ANY, Tile(128, 2, 128, 3, columns=128)),
    TileRow("sm_90", ANY, Tile(256, 2, 128, 2, columns=64)),
    TileRow("sm_90", ANY, Tile(128, 2, 128, 4, columns=64)),
)

CASES = (
    Case("w4 g128", 128, 256, 256, signed(4), 128),
    Case("w4 g128 zeros, odd", 72, 256, 192, signed(4), 128, zeros=True),
    Case("w4 g32, float16", 65, 256, 64, unsigned(4), 32, True, dtype="float16"),
    Case("w4 channel, stacked", 65, 256, 128, signed(4), layers=2),
    Case("w8 channel", 65, 128, 64, INT8),
    Case("w3 g128", 65, 512, 64, signed(3), 128),
    Case("nf4 g64", 65, 128, 64, NF4, 64),
    Case("nf4 g32, odd K", 65, 200, 64, dataclasses.replace(NF4, pack=8), 32),
)


def run(
    p: Problem, a: Operands, tile: Tile, interpret: Any, **options: Any
) -> jax.Array:
    """Run on the operands of a problem, with the function's other options."""
    rows = Rows.of(p, a, **options)
    y = weight_only_prefill(
        rows.x,
        a.codes,
        a.scales,
        a.zeros,
        a.layer,
        coding=p.coding,
        group=p.group,
        tile=tile,
        interpret=interpret or None,
        **rows.options,
    )
    return rows.finished(y)


KERNEL = Kernel(
    "gpu.weight_only_prefill",
    "gpu",
    generations("gpu", "mosaic"),
    "gpu",
    declines,
    run,
    TILES,
)
