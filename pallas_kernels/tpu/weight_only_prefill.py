"""Weight-only products of many rows: bound by the matrix unit.

A block of the weight is scaled and rounded to bfloat16 once, then multiplied with
hundreds of rows in one long product. That rounding is the price: one half of a unit in
the last place of bfloat16 per weight; on v7x another half, for scales that are not in
bfloat16 already.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.epilogue import activation
from pallas_kernels.kernel import Kernel, Operands, Problem, TileRow
from pallas_kernels.reference import Case, matmul
from pallas_kernels.target import generations
from pallas_kernels.tpu import geometry as blocks
from pallas_kernels.tpu.geometry import Geometry, stacked
from pallas_kernels.tpu.layout import stored
from pallas_kernels.tpu.weight_only_decode import shifted_zeros, weight_only_declines

ANY = 1 << 30


@dataclasses.dataclass(frozen=True)
class Tile(blocks.Tile):
    """Block sizes, and how elements become float32.

    Attributes:
        through_bfloat16: first to bfloat16; cheaper where vector units know that dtype.
        rounded_scales: round the scales of groups to bfloat16 too. Widening weights to
            float32 and back takes the slots that issue products on v7x: 18 % more
            clocks than bfloat16 weights take, instead of 4 %.
    """

    through_bfloat16: bool = False
    rounded_scales: bool = False


_V7X = {"through_bfloat16": True, "rounded_scales": True}


TILES = (
    TileRow("v6e", 256, Tile(256, 512, 2048, through_bfloat16=True)),
    TileRow("v7x", 256, Tile(256, 1024, 2048, **_V7X)),
    TileRow("*", 256, Tile(256, 512, 2048)),
    TileRow("v6e", ANY, Tile(512, 512, 2048, through_bfloat16=True)),
    TileRow("v7x", ANY, Tile(512, 1024, 2048, **_V7X)),
    TileRow("*", ANY, Tile(512, 512, 2048)),
)


def weight_only_prefill(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    group: int,
    factor: float = 1.0,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    epilogue: str | None = None,
    tile: Tile = TILES[-1].tile,
    out_dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Return ``f((x · input_scale) @ ((codes − zeros) · scales · factor) + bias)``.

    ``y = x @ bfloat16((c − z) · s)`` with float32 sums. The arguments are those of
    `pallas_kernels.tpu.weight_only_decode.weight_only_decode`.

    Returns:
        ``[M, N]``.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    codes, scales, zeros, layer = stacked(codes, scales, zeros, layer)
    geometry = Geometry.of(x, codes, group, tile)
    if input_scale is not None:
        x = (x.astype(jnp.float32) * input_scale.astype(jnp.float32)).astype(x.dtype)
    x = geometry.padded(x).astype(jnp.bfloat16)
    operands = [
        (geometry.x_spec(), x),
        (geometry.codes_spec(), codes),
        (geometry.scales_spec(), scales),
    ]
    if zeros is not None:
        operands.append((geometry.scales_spec(), zeros.astype(jnp.float32)))
    if bias is not None:
        operands.append((geometry.bias_spec(), bias[None].astype(jnp.float32)))
    flags = Flags(geometry, zeros is not None, bias is not None, factor, epilogue, tile)
    body = functools.partial(_body, flags)
    scratch = [pltpu.VMEM((geometry.m, geometry.n), jnp.float32)]
    return geometry.call(body, layer, operands, out_dtype, scratch, interpret)


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the body of the kernel is to do, beside its arrays."""

    geometry: Geometry
    zeros: bool
    bias: bool
    factor: float
    epilogue: str | None
    tile: Tile


def _body(
    flags: Flags, layer: Any, x: Any, codes: Any, scales: Any, *rest: Any
) -> None:
    """Add one block of K to the sum; after the last, write it."""
    *optional, out, total = rest
    g = flags.geometry
    zero = optional[0][...] if flags.zeros else None

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    w = _weight(codes[...], scales[...], zero, flags)
    if g.ragged:
        w = g.masked(w, 1)
    total[...] += jnp.dot(x[...], w, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        y = total[...] if g.grouped else total[...] * scales[...].astype(jnp.float32)
        y = y * flags.factor if flags.factor != 1.0 else y
        y = y + optional[-1][...] if flags.bias else y
        out[...] = activation(flags.epilogue)(y).astype(out.dtype)


def _weight(
    elements: jax.Array, scale: jax.Array, zero: jax.Array | None, flags: Flags
) -> jax.Array:
    """Return a block of the weight in bfloat16; scaled when it has several groups.

    Integers of 9 bits are exact in bfloat16, so with a scale in bfloat16 the product is
    rounded once, as it is in float32.
    """
    g = flags.geometry
    if not g.grouped:
        w = elements.astype(jnp.float32 if zero is not None else jnp.bfloat16)
        return (w if zero is None else w - zero).astype(jnp.bfloat16)
    narrow = flags.tile.rounded_scales or scale.dtype == jnp.bfloat16
    wide = jnp.bfloat16 if narrow else jnp.float32
    if flags.tile.through_bfloat16:
        elements = elements.astype(jnp.bfloat16)
    w = elements.astype(wide)
    if zero is not None:
        w = w - _per_row(zero.astype(wide), g)
    return (w * _per_row(scale.astype(wide), g)).astype(jnp.bfloat16)


def _per_row(values: jax.Array, g: Geometry) -> jax.Array:
    """Spread ``[groups, n]`` over the rows of a block."""
    return jnp.repeat(values, g.group, axis=0)[: g.k]


def reference(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Return the same in float32 and plain jnp (see `pallas_kernels.reference`)."""
    return matmul(x, codes, scales, zeros, layer, **options)


CASES = (
    Case("w4 g128", 144, 512, 256, "int4", 128),
    Case("w4 channel zeros", 16, 384, 256, "int4", None, zeros=True),
    Case(
        "w4 g32 zeros, float32", 33, 512, 128, "int4", 32, zeros=True, dtype="float32"
    ),
    Case(
        "w8 g128 zeros, bfloat16 scales",
        20,
        256,
        256,
        "int8",
        128,
        zeros=True,
        scale="bfloat16",
    ),
    Case("w4 g64, odd, stacked", 7, 1320, 200, "int4", 64, layers=2),
    Case("w8 channel, all options", 16, 256, 128, "int8", None, options=True),
)


def run(p: Problem, a: Operands, tile: Tile, interpret: Any) -> jax.Array:
    """Run on the operands of a problem."""
    form = stored(p.coding)
    return weight_only_prefill(
        a.x,
        a.codes,
        a.scales,
        shifted_zeros(a, form.shift),
        a.layer,
        group=p.group,
        factor=form.factor,
        tile=tile,
        out_dtype=p.out_dtype,
        interpret=interpret,
    )


KERNEL = Kernel(
    "tpu.weight_only_prefill",
    "tpu",
    generations("tpu"),
    "tpu",
    weight_only_declines,
    run,
    TILES,
)
