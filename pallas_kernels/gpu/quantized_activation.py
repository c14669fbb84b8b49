"""Activations rounded to int8 or fp8 per row, times int8, fp8, int4 or int2 weights.

Rounding is left to XLA, which fuses it into what produced the activation; it also
brings channels into the order of the words' bytes (`layout.permuted`). Weights of 8
bits go from shared memory to the tensor core as they lie; fewer bits are unpacked into
registers, four numbers per instruction. Sums of integers are exact inside a group;
Hopper's tensor cores keep fp8 sums with fewer bits than float32 has.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.gpu.cases import FP8, INT8, Case, signed, unsigned
from pallas_kernels.gpu.finish import Finish
from pallas_kernels.gpu.geometry import Geometry, cannot_cut
from pallas_kernels.gpu.layout import Block, permuted, words_of
from pallas_kernels.gpu.mosaic import (
    PARAMS,
    ROWS,
    Mode,
    per_group,
    pipeline,
    swizzled,
    wide,
)
from pallas_kernels.gpu.rounding import MOST, round_to, scaled_input
from pallas_kernels.gpu.unpack import Bytes
from pallas_kernels.gpu.weight_only import ANY, Tile
from pallas_kernels.kernel import Coding, Kernel, Operands, Problem, TileRow
from pallas_kernels.target import generations

BYTES = 64  # of a slab, per column


def quantized_activation(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    x_scale: jax.Array,
    rounded: str,
    coding: Coding,
    group: int,
    tile: Tile,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: DTypeLike | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Return ``f(q(x · input_scale) @ ((value(codes) − zeros) · scales) + bias)``.

    ``q(x) = t · ⌊x / t⌉``.

    Args:
        x: ``[M, K']``, any float dtype, K' ≤ K.
        codes: uint16 ``[slabs, 32 N]`` (see `layout`), ``[L, ...]`` with a layer.
        scales: float ``[groups, N]``; groups and N may be 1.
        zeros: integers like ``scales``, or None.
        layer: int32 scalar, or None.
        x_scale: float32 ``[M, 1]``, the t above.
        rounded: ``"int8"`` or ``"float8_e4m3fn"``.
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
    g = Geometry.of(
        rows, codes, scales.shape[-2], coding, group, tile, (1, out_dtype.itemsize)
    )
    down = (0, g.padded_rows - rows)
    units = jnp.pad(x_scale.astype(jnp.float32)[:, 0], down)
    finish = Finish(bias is not None, epilogue)
    x = scaled_input(x, input_scale)
    x = round_to(jnp.pad(x, (down, (0, g.inner - x.shape[1]))), units, rounded)
    element = jnp.dtype(rounded if coding.bits == 8 else "uint8")
    arrays = [
        permuted(x, coding.bits),
        bytes_of(words_of(codes, g.columns), element),
        wide(
            per_group(scales, layer, g.inner, g.group).astype(jnp.float32),
            columns,
            g.columns,
        ),
        units,
    ]
    if zeros is not None:
        less = zeros.astype(jnp.int32) - coding.lowest
        arrays.append(
            wide(
                per_group(less, layer, g.inner, g.group).astype(jnp.uint8),
                columns,
                g.columns,
            )
        )
    arrays += finish.operands(bias, g.columns)
    index = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    direct = out_dtype != jnp.float32
    size = (g.rows, ROWS) if direct else (ROWS, g.rows)
    shape = (g.padded_rows, g.columns) if direct else (g.columns, g.padded_rows)
    buffer = plgpu.SMEM(
        (g.warpgroups, *size), out_dtype, transforms=swizzled(16) if direct else ()
    )
    y = plgpu.kernel(
        functools.partial(_kernel, g, finish, out_dtype, interpret),
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(g.row_tiles, g.column_tiles),
        grid_names=("m", "n"),
        num_threads=g.warpgroups + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        scratch_types={
            "buffer": buffer,
            "row_units": plgpu.SMEM((g.rows,), jnp.float32),
            "column_scales": plgpu.SMEM((g.tile_columns,), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=2),
            **finish.scratch(g.tile_columns),
        },
        interpret=interpret,
    )(*arrays, index)
    return (y if direct else y.T)[:rows, :columns]


def bytes_of(words: jax.Array, element: Any) -> jax.Array:
    """View words ``[slabs, N, 32]`` as elements of a byte: ``[slabs, N, 64]``."""
    two = lax.bitcast_convert_type(words, element)
    return two.reshape(*words.shape[:-1], BYTES)


def _kernel(
    g: Geometry,
    finish: Finish,
    dtype: Any,
    interpret: Any,
    x: Any,
    codes: Any,
    scales: Any,
    units: Any,
    *rest: Any,
    buffer: Any,
    row_units: Any,
    column_scales: Any,
    loaded: Any,
    kept: Any = None,
) -> None:
    """Sum one tile ``[columns, rows]`` of the result over K, and write it."""
    *given, index, out = rest
    zeros, bias = finish.parted(given)
    mode = Mode(interpret)
    layer = index[0]
    wg, n, m = (lax.axis_index(name) for name in ("wg", "n", "m"))
    here, rows = pl.ds(wg * g.each, g.each), pl.ds(m * g.rows, g.rows)
    summed = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    single = g.groups == 1

    size = g.each, g.rows
    add = functools.partial(_accumulate, g, mode, here)

    def step(_: Any, w: Any, x: Any, s: Any, *more: Any) -> Any:
        *z, carry = more
        if single:
            total = mode.sum_of(carry)
            add(w, x, z, 0, total)
            mode.release()
            return mode.carry_of(total)
        for i in range(g.scales):
            part = mode.partial(size, summed, functools.partial(add, w, x, z, i))
            scale = mode.per_row(s.at[i, here], part.shape, jnp.float32)
            carry = carry + part.astype(jnp.float32) * scale
        mode.release()
        return carry

    def wait() -> None:
        plgpu.barrier_wait(loaded)
        finish.wait(kept)

    def write(total: jax.Array) -> None:
        wait()
        y = total.astype(jnp.float32)
        if single:
            y = y * mode.per_row(column_scales.at[here], y.shape, jnp.float32)
        y = y * mode.per_column(row_units, y.shape, jnp.float32)
        for start in range(0, g.each, ROWS):
            mine = pl.ds(wg * g.each + start, ROWS)
            part = finish(mode, y[start : start + ROWS], kept, mine).astype(dtype)
            columns = pl.ds(n * g.tile_columns + wg * g.each + start, ROWS)
            mode.write(buffer.at[wg], part, out, rows, columns)

    @pl.when(wg == g.warpgroups)
    def _() -> None:
        columns = pl.ds(n * g.tile_columns, g.tile_columns)
        plgpu.copy_gmem_to_smem(units.at[rows], row_units, loaded)
        plgpu.copy_gmem_to_smem(scales.at[layer, columns], column_scales, loaded)
        finish.fetch(bias, kept, columns)

    whole = mode.accumulated(size, summed, write)
    pipeline(
        step,
        grid=(g.steps,),
        in_specs=_specs(g, layer, m, n, len(zeros)),
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=g.warpgroups,
        max_concurrent_steps=g.stages,
        compute_context=whole if single else mode.carried(size, write),
    )(codes, x, scales, *zeros)
    mode.also(wg == g.warpgroups, wait)


def _accumulate(
    g: Geometry,
    mode: Mode,
    here: Any,
    w: Any,
    x: Any,
    z: list[Any],
    group: int,
    total: Any,
) -> None:
    """Add the products of one group of a step."""
    count = g.run // BYTES
    for j in range(group * count, (group + 1) * count):
        left = _left(g, mode, w, z, here, j)
        last = j == (group + 1) * count - 1
        in_flight = 0 if last else None if g.coding.bits == 8 else 1
        mode.multiply(total, left, x.at[:, pl.ds(j * BYTES, BYTES)], in_flight)


def _left(
    g: Geometry, mode: Mode, words: Any, zeros: list[Any], here: Any, j: int
) -> Any:
    """Return the j-th left operand of a step: a view of memory, or int8 registers."""
    bits = g.coding.bits
    if bits == 8:
        return words.at[j, here]
    slab, field = divmod(j, 8 // bits)
    program = functools.partial(_run_field, Bytes(g.coding, bool(zeros)), field)
    zero = None
    for z in zeros:
        row = z.at[j * BYTES // g.run, here]
        value = mode.cast(row[...], plgpu.Layout.WGMMA_8BIT.reduce(1))
        zero = lax.broadcast_in_dim(value, (g.each, BYTES), (0,))
    word = mode.cast(words[slab, here], plgpu.Layout.WGMMA_8BIT)
    return mode.unpacked_bytes(program, word, zero)


def _run_field(unpack: Bytes, field: int, m: Any, words: Any) -> Any:
    return unpack.program(m, words, [field])


def _specs(g: Geometry, layer: Any, m: Any, n: Any, zeros: int) -> list[Any]:
    """Return where a step's bytes, activation, scales and zero points are."""
    words = plgpu.BlockSpec(
        (g.slabs, g.tile_columns, BYTES),
        lambda i: (g.step_of(layer, 0, i), n, 0),
        transforms=swizzled(8, BYTES),
    )
    rows = plgpu.BlockSpec(
        (g.rows, g.step), lambda i: (m, i), transforms=swizzled(8, BYTES)
    )
    scales = plgpu.BlockSpec(
        (g.scales, g.tile_columns), lambda i: (g.scales_of(layer, 0, i), n)
    )
    return [words, rows, scales, *[scales] * zeros]


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    if p.rows == 0:
        return "there are no rows"
    if p.activation not in MOST:
        kind = "stays float" if p.activation is None else f"is {p.activation}"
        return f"the activation {kind}"
    bits, kind = p.coding.bits, p.coding.kind
    if kind != ("integer" if p.activation == "int8" else p.activation):
        return f"no product of {p.activation} with {kind} codes"
    if bits not in (2, 4, 8):
        return f"{bits}-bit codes do not lie four to a register"
    if bits == 8 and (p.zeros or (kind == "integer" and p.coding.lowest == 0)):
        return "unsigned bytes, or bytes less a zero point, do not fit int8"
    least = Block(bits).rows
    if p.group < p.inner and p.group % least:
        return f"groups of {p.group} cut blocks of {least}"
    return cannot_cut(p)


TILES = (
    TileRow("sm_90", 16, Tile(16, 2, 256, 6)),
    TileRow("sm_90", 64, Tile(64, 2, 128, 6)),
    TileRow("sm_90", ANY, Tile(128, 2, 128, 4)),
    TileRow("sm_90", ANY, Tile(256, 2, 128, 3)),
    TileRow("sm_90", ANY, Tile(128, 2, 128, 4, columns=128)),
)

CASES = (
    Case("w8a8", 16, 256, 128, INT8, activation="int8"),
    Case("w8a8, odd, stacked", 37, 128, 72, INT8, layers=2, activation="int8"),
    Case("w8a8 g64, float32", 5, 128, 64, INT8, 64, False, None, "float32", "int8"),
    Case("w4a8 channel", 16, 256, 128, signed(4), activation="int8"),
    Case("w4a8 g128 zeros", 16, 256, 64, unsigned(4), 128, True, activation="int8"),
    Case("w8a8 g64, odd K", 5, 200, 64, INT8, 64, activation="int8"),
    Case(
        "w4a8 zeros, odd K", 5, 200, 64, unsigned(4, 8), None, True, activation="int8"
    ),
    Case("w2a8 g256", 8, 512, 64, signed(2), 256, activation="int8"),
    Case("fp8 x fp8", 16, 128, 64, FP8, activation="float8_e4m3fn"),
)


def run(
    p: Problem, a: Operands, tile: Tile, interpret: Any, **options: Any
) -> jax.Array:
    """Run on the operands of a problem, with the function's other options."""
    if a.x_scale is None or p.activation is None:
        raise ValueError(f"{KERNEL.name} rounds the activation, and needs its x_scale")
    return quantized_activation(
        a.x,
        a.codes,
        a.scales,
        a.zeros,
        a.layer,
        x_scale=a.x_scale,
        rounded=p.activation,
        coding=p.coding,
        group=p.group,
        tile=tile,
        out_dtype=p.out_dtype,
        interpret=interpret or None,
        **options,
    )


KERNEL = Kernel(
    "gpu.quantized_activation",
    "gpu",
    generations("gpu", "mosaic"),
    "gpu",
    declines,
    run,
    TILES,
)
