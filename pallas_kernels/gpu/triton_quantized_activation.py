"""Activations rounded to int8 (or fp8 on Ada) per row, through Pallas-Triton.

As `quantized_activation` is on Hopper: XLA rounds the activation and brings its
channels into the order of the words' bytes; groups are summed as integers. For what is
deprecated see `triton_weight_only`.
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

from pallas_kernels.gpu import quantized_activation as hopper
from pallas_kernels.gpu.cases import FP8, INT8, Case, signed, unsigned
from pallas_kernels.gpu.layout import matrix, permuted, words_of
from pallas_kernels.gpu.mosaic import per_group, wide
from pallas_kernels.gpu.quantized_activation import BYTES, bytes_of
from pallas_kernels.gpu.rounding import round_to, scaled_input
from pallas_kernels.gpu.triton_finish import Ending, Finish
from pallas_kernels.gpu.triton_grid import Cut, Tile, by_rows
from pallas_kernels.gpu.unpack import Bytes
from pallas_kernels.gpu.weight_only import ANY
from pallas_kernels.gpu.words import Arrays, assemble
from pallas_kernels.kernel import Coding, Kernel, Operands, Problem, TileRow
from pallas_kernels.target import generations


def triton_quantized_activation(
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
    interpret: bool = False,
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
        tile: how to cut.
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
    cut = Cut.of(rows, codes, scales.shape[-2], coding, group, tile)
    x, units = scaled_input(x, input_scale), x_scale.astype(jnp.float32)[:, 0]
    element = jnp.dtype(rounded if coding.bits == 8 else "uint8")
    arrays = [
        permuted(cut.whole(round_to(x, units, rounded)), coding.bits),
        bytes_of(words_of(codes, cut.columns), element),
        wide(per_group(scales, layer, cut.inner, cut.group), columns, cut.columns),
    ]
    if zeros is not None:
        less = (zeros.astype(jnp.int32) - coding.lowest).astype(jnp.uint8)
        arrays.append(
            wide(per_group(less, layer, cut.inner, cut.group), columns, cut.columns)
        )
    arrays.append(jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1))
    body = functools.partial(_kernel, cut, Bytes(coding, zeros is not None), interpret)
    finish = Finish(out_dtype, units, bias, epilogue)
    return finish.run(cut, body, arrays, (1, rows, columns), interpret)


def _kernel(
    cut: Cut,
    unpack: Bytes,
    interpret: bool,
    finish: Ending,
    x: Any,
    codes: Any,
    scales: Any,
    *rest: Any,
    more: Sequence[Any],
    out: Any,
) -> None:
    """Sum one tile ``[columns, rows]`` of the result over a part of K."""
    *zeros, index = rest
    size = cut.tile.columns, cut.tile.rows
    layer, first = index[0], pl.program_id(2) * cut.steps
    blocks = cut.inner // cut.block.rows
    fields = 8 // cut.block.bits
    summed = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i: Any, total: jax.Array) -> jax.Array:
        block = first + i
        row = cut.scale_of(layer, block, 0)
        word = codes[layer * blocks + block]
        part = jnp.zeros(size, summed)
        for field in range(fields):
            zero = [jnp.broadcast_to(z[row][:, None], word.shape) for z in zeros]
            left = word if fields == 1 else _field(unpack, interpret, field, word, zero)
            here = pl.ds(block * cut.block.rows + field * BYTES, BYTES)
            part = part + by_rows(left, x[:, here], summed)
        scale = scales[row].astype(jnp.float32)[:, None]
        return total + part.astype(jnp.float32) * scale

    total = lax.fori_loop(0, cut.steps, step, jnp.zeros(size, jnp.float32))
    out[...] = finish(total, more)


def _field(
    unpack: Bytes, interpret: bool, field: int, word: jax.Array, zeros: list[jax.Array]
) -> jax.Array:
    """Unpack one field of every byte: int8 ``[columns, 64]``."""
    program = lambda m, words: unpack.program(m, words, [field])
    operands = [word, *zeros]
    if interpret:
        shape = (*word.shape[:-1], word.shape[-1] // 4, 4)
        fours = [
            lax.bitcast_convert_type(a.reshape(shape), jnp.uint32) for a in operands
        ]
        (found,) = program(Arrays(), fours)
        return lax.bitcast_convert_type(found, jnp.int8).reshape(word.shape)
    assembly = assemble(program, len(operands), 1)
    (result,) = triton.elementwise_inline_asm(
        assembly.text,
        args=operands,
        constraints=assembly.constraints,
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(word.shape, jnp.int8)],
    )
    return result


TILES = (
    TileRow("*", 16, Tile(16, 64, 1, 4, 4)),
    TileRow("*", 64, Tile(64, 64, 1, 4, 3)),
    TileRow("*", ANY, Tile(128, 128, 1, 8, 3)),
    TileRow("*", ANY, Tile(128, 64, 1, 4, 4)),
)

CASES = (
    Case("w8a8", 16, 256, 128, INT8, activation="int8"),
    Case("w8a8 g64, odd, stacked", 9, 128, 72, INT8, 64, layers=2, activation="int8"),
    Case("w4a8 g128 zeros", 16, 256, 64, unsigned(4), 128, True, activation="int8"),
    Case("w8a8 g64, odd K", 5, 200, 64, INT8, 64, activation="int8"),
    Case("w4a8 channel", 5, 256, 64, signed(4), activation="int8", dtype="float32"),
    Case("fp8 x fp8", 16, 128, 64, FP8, activation="float8_e4m3fn"),
)


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    return hopper.declines(p)


def run(
    p: Problem, a: Operands, tile: Tile, interpret: Any, **options: Any
) -> jax.Array:
    """Run on the operands of a problem, with the function's other options."""
    if a.x_scale is None or p.activation is None:
        raise ValueError(f"{KERNEL.name} rounds the activation, and needs its x_scale")
    return triton_quantized_activation(
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
        interpret=bool(interpret),
        **options,
    )


KERNEL = Kernel(
    "gpu.triton_quantized_activation",
    "gpu",
    generations("gpu", "triton"),
    "gpu",
    declines,
    run,
    TILES,
)
