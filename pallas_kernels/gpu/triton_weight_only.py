"""Float activations times packed weights on Ampere and Ada, through Pallas-Triton.

The layout and the unpacking are Hopper's (`weight_only`); Triton copies through its own
pipeline and chooses its own tensor core instructions. JAX has deprecated this backend
since 0.11, and still ships it in 0.12; its successor for these GPUs, `plgpu.mma` of
Mosaic GPU, does not exist before 0.11.

A table of 256 numbers is looked up in memory, through the first cache. No kernel of
Hopper's does that, so that one runs there, too.

Where one thread block sums all of K, it finishes the result; else XLA does (float32
activations are two or three products, and a split K is as many parts).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from pallas_kernels.gpu.cases import FP8, INT8, NF4, TABLE8, Case, signed, unsigned
from pallas_kernels.gpu.layout import WORDS, matrix, words_of
from pallas_kernels.gpu.mosaic import Unpacked, by_arrays, per_group, wide
from pallas_kernels.gpu.rounding import Rows, scaled_input
from pallas_kernels.gpu.triton_finish import Ending, Finish
from pallas_kernels.gpu.triton_grid import Cut, Tile, by_rows
from pallas_kernels.gpu.unpack import Floats
from pallas_kernels.gpu.weight_only import ANY, split, weight_only_declines
from pallas_kernels.gpu.words import assemble
from pallas_kernels.kernel import Coding, Kernel, Operands, Problem, TileRow
from pallas_kernels.target import generations


def triton_weight_only(
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
    interpret: bool = False,
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
        interpret: whether to run on a CPU.

    Returns:
        ``[M, N]``.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    rows, columns = x.shape[0], matrix(codes.shape, coding)[1]
    x = split(scaled_input(x, input_scale), parts)
    cut = Cut.of(x.shape[0], codes, scales.shape[-2], coding, group, tile)
    arrays = [
        cut.whole(x),
        words_of(codes, cut.columns),
        wide(per_group(scales, layer, cut.inner, cut.group), columns, cut.columns),
    ]
    if zeros is not None:
        arrays.append(
            wide(per_group(zeros, layer, cut.inner, cut.group), columns, cut.columns)
        )
    arrays.append(jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1))
    if looked_up(coding):
        arrays.append(jnp.asarray(coding.table, x.dtype))
    floats = Floats(coding, x.dtype.name, zeros is not None)
    finish = Finish(out_dtype, bias=bias, epilogue=epilogue)
    body = functools.partial(_kernel, cut, floats, interpret)
    many = x.shape[0] // max(rows, 1)
    return finish.run(cut, body, arrays, (many, rows, columns), interpret)


def _kernel(
    cut: Cut,
    floats: Floats,
    interpret: bool,
    finish: Ending,
    x: Any,
    words: Any,
    scales: Any,
    *rest: Any,
    more: Sequence[Any],
    out: Any,
) -> None:
    """Sum one tile ``[columns, rows]`` of the result over a part of K."""
    rest, table = (rest[:-1], rest[-1]) if looked_up(floats.coding) else (rest, None)
    *zeros, index = rest
    size = cut.tile.columns, cut.tile.rows
    layer, first = index[0], pl.program_id(2) * cut.steps
    blocks = cut.inner // cut.block.rows
    planes = cut.run // WORDS

    def step(i: Any, total: jax.Array) -> jax.Array:
        block = first + i
        start = (layer * blocks + block) * cut.block.slabs
        if table is None:
            numbers = _numbers(cut, floats, interpret, words, start)
        else:
            word = words[start].astype(jnp.int32)
            numbers = [table[word & 0xFF], table[word >> 8]]
        for run in range(cut.block.rows // cut.run):
            row = cut.scale_of(layer, block, run)
            part = jnp.zeros(size, jnp.float32)
            for plane in range(run * planes, (run + 1) * planes):
                w = numbers[plane]
                for z in zeros:
                    zero = z[row].astype(jnp.float32) + jnp.float32(floats.offset)
                    w = w - zero.astype(w.dtype)[:, None]
                here = pl.ds(block * cut.block.rows + plane * WORDS, WORDS)
                part = part + by_rows(w, x[:, here], jnp.float32)
            total = total + part * scales[row].astype(jnp.float32)[:, None]
        return total

    total = lax.fori_loop(0, cut.steps, step, jnp.zeros(size, jnp.float32))
    out[...] = finish(total, more)


def looked_up(coding: Coding) -> bool:
    """Whether codes are addresses: of a table too large for registers."""
    return coding.kind == "table" and coding.bits == 8


def _numbers(
    cut: Cut, floats: Floats, interpret: bool, words: Any, start: Any
) -> list[jax.Array]:
    """Unpack a block: ``[columns, 32]`` per plane."""
    slabs = [words[start + slab] for slab in range(cut.block.slabs)]
    found: list[jax.Array] = []
    for plane in range(cut.block.planes):
        program = lambda m, w, plane=plane: floats.program(m, w, [plane])
        mine = [slabs[s] for s in floats.slabs([plane])]
        if interpret:
            found += by_arrays(program, mine, Unpacked(floats.dtype, 1, 1))
        else:
            found.append(_by_assembly(program, mine, floats.dtype))
    return found


def _by_assembly(program: Any, words: Sequence[jax.Array], dtype: str) -> jax.Array:
    """Run a program with one result; what two of them share, ptxas finds."""
    assembly = assemble(program, len(words), 1)
    (result,) = triton.elementwise_inline_asm(
        assembly.text,
        args=list(words),
        constraints=assembly.constraints,
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words[0].shape, jnp.dtype(dtype))],
    )
    return result


TILES = (
    TileRow("*", 16, Tile(16, 64, 1, 4, 4)),
    TileRow("*", 32, Tile(32, 64, 1, 4, 4)),
    TileRow("*", 64, Tile(64, 64, 1, 4, 3)),
    TileRow("*", ANY, Tile(128, 64, 1, 4, 3)),
    TileRow("*", ANY, Tile(16, 128, 1, 4, 4)),
    TileRow("*", ANY, Tile(16, 64, 4, 4, 4)),
    TileRow("*", ANY, Tile(64, 128, 1, 8, 3)),
)

CASES = (
    Case("w4 g128", 16, 512, 128, signed(4), 128),
    Case("w4 g32 zeros, float16", 5, 256, 64, unsigned(4), 32, True, dtype="float16"),
    Case(
        "w4 channel, stacked, float32", 3, 256, 64, signed(4), None, True, 2, "float32"
    ),
    Case("w3 g128, odd", 9, 512, 72, signed(3), 128),
    Case("w3a8 g128 zeros", 5, 512, 64, unsigned(3), 128, True, activation="int8"),
    Case("w4 g32 zeros, odd K, stacked", 5, 328, 64, signed(4, 8), 32, True, 2),
    Case("w8 channel", 8, 256, 64, INT8),
    Case("nf4 g64", 16, 256, 64, NF4, 64),
    Case("fp8 channel", 8, 128, 64, FP8),
    Case("dynamic8 g64, odd K", 5, 200, 72, TABLE8, 64),
    Case("dynamic8, stacked, float16", 3, 128, 64, TABLE8, layers=2, dtype="float16"),
    Case("w4 g128, many rows", 130, 256, 64, signed(4), 128, zeros=True),
)


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    return weight_only_declines(p)


def run(
    p: Problem, a: Operands, tile: Tile, interpret: Any, **options: Any
) -> jax.Array:
    """Run on the operands of a problem, with the function's other options."""
    rows = Rows.of(p, a, **options)
    y = triton_weight_only(
        rows.x,
        a.codes,
        a.scales,
        a.zeros,
        a.layer,
        coding=p.coding,
        group=p.group,
        tile=tile,
        parts=3 if p.precise else 2,
        interpret=bool(interpret),
        **rows.options,
    )
    return rows.finished(y)


KERNEL = Kernel(
    "gpu.triton_weight_only",
    "gpu",
    generations("gpu"),  # on Hopper, tables of 256 numbers
    "gpu",
    declines,
    run,
    TILES,
)
