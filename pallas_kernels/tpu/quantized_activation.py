"""Products of activations rounded to int8 or fp8 per row, with the rounding inside.

The activation comes as floats with one scale per row. Its first use (by the first
blocks of columns) rounds it into vector memory, where it stays for the others: no
rounded copy ever exists in main memory, and none is made twice.
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
from pallas_kernels.tpu.geometry import Geometry, Tile, stacked
from pallas_kernels.tpu.layout import declines as layout_declines
from pallas_kernels.tpu.layout import stored
from pallas_kernels.tpu.weight_only_decode import shifted_zeros

ANY = 1 << 30
KEPT_BYTES = 16 << 20  # of the rounded activation in vector memory

TILES = (
    TileRow("*", 128, Tile(128, 1024, 4096)),
    TileRow("*", ANY, Tile(512, 1024, 1024)),
)

WEIGHTS = {"int8": ("int4", "int8"), "float8_e4m3fn": ("int4", "float8_e4m3fn")}


def quantized_activation(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    x_scale: jax.Array,
    rounded: DTypeLike,
    group: int,
    factor: float = 1.0,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    epilogue: str | None = None,
    tile: Tile = TILES[-1].tile,
    out_dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Return ``f(q(x · input_scale) @ ((codes − zeros) · scales · factor) + bias)``.

    ``q(x) = t · ⌊x / t⌉`` with t the scale of a row; the products inside a group are
    integers (or fp8) and their sums exact (or float32).

    Args:
        x: ``[M, K]``, any float dtype.
        codes: int4, int8 or float8 ``[K', N]``, K' ≥ K; ``[L, K', N]`` with a layer.
        scales: float ``[groups, N]`` or ``[L, groups, N]``.
        zeros: integers like ``scales``, or None.
        layer: int32 scalar: which matrix of the stacks; None when there is one.
        x_scale: float32 ``[M, 1]``.
        rounded: ``"int8"`` or ``"float8_e4m3fn"``.
        group: rows per scale.
        factor: of all weights.
        bias: ``[N]``, or None.
        input_scale: ``[K]``, or None; ``x_scale`` is that of the scaled activation.
        epilogue: a key of `pallas_kernels.epilogue.ACTIVATIONS`.
        tile: the largest blocks.
        out_dtype: of the result; that of ``x`` by default.
        interpret: as `jax.experimental.pallas.pallas_call` takes it.

    Returns:
        ``[M, N]``.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    codes, scales, zeros, layer = stacked(codes, scales, zeros, layer)
    g = _geometry(x, codes, group, tile)
    if input_scale is not None:
        x = (x.astype(jnp.float32) * input_scale.astype(jnp.float32)).astype(x.dtype)
    x = g.padded(x)
    rows = jnp.where(x_scale == 0, jnp.float32(1), x_scale.astype(jnp.float32))
    pad = ((0, x.shape[0] - rows.shape[0]), (0, 0))
    # once it has been rounded, a block of x is not fetched again
    index = lambda i, j, k, layer: (i, jnp.where(j == 0, k, g.steps - 1))
    operands = [
        (pl.BlockSpec((g.m, g.k), index), x),
        (g.codes_spec(), codes),
        (g.scales_spec(), scales),
        (g.row_spec(), jnp.pad(rows, pad, constant_values=1)),
    ]
    if zeros is not None:
        operands.append((g.scales_spec(), zeros.astype(jnp.float32)))
    if bias is not None:
        operands.append((g.bias_spec(), bias[None].astype(jnp.float32)))
    exact = jnp.issubdtype(rounded, jnp.integer) and not g.grouped and zeros is None
    scratch = [
        pltpu.VMEM((g.m, g.n), jnp.int32 if exact else jnp.float32),
        pltpu.VMEM((g.steps, g.m, g.k), jnp.dtype(rounded)),
        pltpu.VMEM((g.steps if zeros is not None else 1, g.m, g.groups), jnp.float32),
    ]
    flags = Flags(g, zeros is not None, bias is not None, factor, epilogue)
    body = functools.partial(_body, flags)
    semantics = ("parallel", "arbitrary", "arbitrary")
    return g.call(body, layer, operands, out_dtype, scratch, interpret, semantics)


def _geometry(x: jax.Array, codes: jax.Array, group: int, tile: Tile) -> Geometry:
    """Fit a tile whose rounded activation fits vector memory."""
    g = Geometry.of(x, codes, group, tile)
    while g.m > 16 and g.m * g.k * g.steps > KEPT_BYTES:
        g = Geometry.of(x, codes, group, dataclasses.replace(tile, m=g.m // 2))
    return g


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the body of the kernel is to do, beside its arrays."""

    geometry: Geometry
    zeros: bool
    bias: bool
    factor: float
    epilogue: str | None


def _body(
    flags: Flags, layer: Any, x: Any, codes: Any, scales: Any, x_scale: Any, *rest: Any
) -> None:
    """Add one block of K to the sum; after the last, write it."""
    *optional, out, total, kept, sums = rest
    g, step = flags.geometry, pl.program_id(2)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        units = x[...].astype(jnp.float32) / x_scale[...]
        kept[step] = _rounded(units, kept.dtype)
        if flags.zeros:
            _store_sums(kept[step].astype(jnp.float32), sums, step, g)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    scale, part = scales[...].astype(jnp.float32), total[...]
    if g.grouped:
        scale = g.masked(scale, g.group)
    for i in range(g.groups):
        rows = (
            slice(i * g.group, min((i + 1) * g.group, g.k)) if g.grouped else slice(g.k)
        )
        dot = _dot(kept[step, :, rows], _block(codes, rows, g), total.dtype)
        part += dot * scale[i : i + 1] if g.grouped else dot
    if flags.zeros:
        zero = optional[0][...]
        zero = g.masked(zero, g.group) * scale if g.grouped else zero
        part -= jnp.dot(sums[step], zero, precision="highest")
    total[...] = part

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y = total[...].astype(jnp.float32) * x_scale[...]
        y = y if g.grouped else y * scale
        y = y * flags.factor if flags.factor != 1.0 else y
        y = y + optional[-1][...] if flags.bias else y
        out[...] = activation(flags.epilogue)(y).astype(out.dtype)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Return float32 ``x`` rounded to int8 or fp8, saturating."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.clip(jnp.round(x), -127.0, 127.0).astype(dtype)
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def _store_sums(x: jax.Array, sums: Any, step: Any, g: Geometry) -> None:
    """Keep the sums over the groups of a block of the rounded activation."""
    for i in range(g.groups):
        rows = (
            slice(i * g.group, min((i + 1) * g.group, g.k)) if g.grouped else slice(g.k)
        )
        sums[step, :, i : i + 1] = jnp.sum(x[:, rows], axis=1, keepdims=True)


def _block(codes: Any, rows: slice, g: Geometry) -> jax.Array:
    """Return some rows of the weight, without the garbage that fp8 may hold."""
    w = codes[rows]
    if g.ragged and jnp.issubdtype(w.dtype, jnp.floating):
        row = jax.lax.broadcasted_iota(jnp.int32, w.shape, 0) + (rows.start or 0)
        inside = row < g.rows_left()
        w = jnp.where(inside, w.astype(jnp.float32), 0.0).astype(w.dtype)
    return w


def _dot(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """Multiply integers into int32, fp8 into float32; return it in ``dtype``."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        # Mosaic multiplies integers of one width only
        y = jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.int32)
        return y.astype(dtype)
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    if p.rows == 0:
        return "there are no rows"
    if p.activation not in WEIGHTS:
        kind = "stays float" if p.activation is None else f"is {p.activation}"
        return f"the activation {kind}"
    if (reason := layout_declines(p.coding)) is not None:
        return reason
    if p.coding.kind == "table":
        return "a table's numbers are no integers"
    form = stored(p.coding)
    if form.dtype not in WEIGHTS[p.activation]:
        return f"no product of {p.activation} with {form.dtype}"
    if p.group < p.inner and p.group % 32:
        return f"groups of {p.group} are not a multiple of 32"
    if p.inner * 16 > 2 * KEPT_BYTES:
        return f"{p.inner} channels do not fit vector memory"
    return None


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
    Case("w8a8", 16, 256, 256, "int8", None, rounded="int8"),
    Case("w4a8 g128 zeros", 5, 512, 256, "int4", 128, zeros=True, rounded="int8"),
    Case(
        "w8a8 zeros, stacked, odd",
        7,
        131,
        77,
        "int8",
        None,
        zeros=True,
        layers=2,
        rounded="int8",
    ),
    Case(
        "w4a8 channel, float32",
        9,
        256,
        128,
        "int4",
        None,
        dtype="float32",
        rounded="int8",
    ),
    Case(
        "fp8 x fp8, all options",
        16,
        256,
        128,
        "float8_e4m3fn",
        None,
        rounded="float8_e4m3fn",
        options=True,
    ),
    Case("fp8 x int4 g128", 16, 256, 128, "int4", 128, rounded="float8_e4m3fn"),
)


def run(p: Problem, a: Operands, tile: Tile, interpret: Any) -> jax.Array:
    """Run on the operands of a problem."""
    if a.x_scale is None or p.activation is None:
        raise ValueError(f"{KERNEL.name} rounds the activation, and needs its x_scale")
    form = stored(p.coding)
    return quantized_activation(
        a.x,
        a.codes,
        a.scales,
        shifted_zeros(a, form.shift),
        a.layer,
        x_scale=a.x_scale,
        rounded=p.activation,
        group=p.group,
        factor=form.factor,
        tile=tile,
        out_dtype=p.out_dtype,
        interpret=interpret,
    )


KERNEL = Kernel(
    "tpu.quantized_activation",
    "tpu",
    generations("tpu"),
    "tpu",
    declines,
    run,
    TILES,
)
