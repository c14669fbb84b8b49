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

from pallas_kernels.gpu.cases import INT8, NF4, Case, signed, unsigned
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
from pallas_kernels.gpu.rounding import rounded_rows, scaled_rows
from pallas_kernels.gpu.unpack import Floats
from pallas_kernels.gpu.weight_only import ANY, Tile, weight_only_declines
from pallas_kernels.kernel import Coding, Kernel, Operands, Problem, TileRow

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
    out_dtype: DTypeLike | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Return ``x @ ((value(codes) − zeros) · scales)``, the weight rounded like ``x``.

    Args:
        x: ``[M, K']``, bfloat16 or float16, K' ≤ K.
        codes: uint16 ``[slabs, 32 N]`` (see `layout`), ``[L, ...]`` with a layer.
        scales: float ``[groups, N]``; groups and N may be 1.
        zeros: integers like ``scales``, or None.
        layer: int32 scalar, or None.
        coding: what codes stand for.
        group: rows per scale.
        tile: how to cut; K is not split.
        out_dtype: of the result; that of ``x`` by default.
        interpret: ``InterpretGPUParams`` to run on a CPU.

    Returns:
        ``[M, N]``.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    rows, columns = x.shape[0], codes.shape[-1] // 32
    g = Geometry.of(rows, codes, scales.shape[-2], coding, group, tile, (2, 2))
    arrays = [
        jnp.pad(x, ((0, g.padded_rows - rows), (0, g.inner - x.shape[1]))),
        words_of(codes, g.columns),
        wide(per_group(scales, layer, g.inner, g.group), columns, g.columns),
    ]
    if zeros is not None:
        arrays.append(
            wide(per_group(zeros, layer, g.inner, g.group), columns, g.columns)
        )
    index = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    floats = Floats(coding, x.dtype.name, zeros is not None)
    buffer = plgpu.SMEM((g.warpgroups, g.rows, ROWS), x.dtype, transforms=swizzled(16))
    y = plgpu.kernel(
        functools.partial(_kernel, g, floats, interpret),
        out_type=jax.ShapeDtypeStruct((g.padded_rows, g.columns), x.dtype),
        grid=(g.row_tiles, g.column_tiles),
        grid_names=("m", "n"),
        num_threads=g.warpgroups + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        scratch_types=[buffer],
        interpret=interpret,
    )(*arrays, index)
    return y[:rows, :columns].astype(out_dtype)


def _kernel(
    g: Geometry,
    floats: Floats,
    interpret: Any,
    x: Any,
    codes: Any,
    scales: Any,
    *rest: Any,
) -> None:
    """Sum one tile ``[columns, rows]`` of the result over K, and write it."""
    *zeros, index, out, buffer = rest
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
        for start in range(0, g.each, ROWS):
            part = total[start : start + ROWS].astype(x.dtype)
            columns = pl.ds(n * g.tile_columns + wg * g.each + start, ROWS)
            mode.write(buffer.at[wg], part, out, pl.ds(m * g.rows, g.rows), columns)

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
    return weight_only_declines(p)


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


def run(p: Problem, a: Operands, tile: Tile, interpret: Any) -> jax.Array:
    """Run on the operands of a problem."""
    x, units = rounded_rows(p, a)
    y = weight_only_prefill(
        x,
        a.codes,
        a.scales,
        a.zeros,
        a.layer,
        coding=p.coding,
        group=p.group,
        tile=tile,
        out_dtype=p.out_dtype if units is None else jnp.float32,
        interpret=interpret or None,
    )
    return scaled_rows(y, units, p)


KERNEL = Kernel(
    "gpu.weight_only_prefill", "gpu", ("sm_90",), "gpu", declines, run, TILES
)
