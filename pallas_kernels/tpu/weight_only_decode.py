"""Weight-only products of few rows: bound by the bytes of the weight.

Group scales multiply partial sums (rows × groups numbers), not weights (K × N): with 16
rows that is an eighth of the work. Zero points cost one more product per block, of the
sums of the activation over groups with ``zero · scale``.
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

MOST_ROWS = 128  # beyond, scaling partial sums costs more than scaling weights

TILES = (
    TileRow("*", MOST_ROWS, Tile(128, 1024, 4096)),
    TileRow("*", MOST_ROWS, Tile(128, 512, 8192)),
    TileRow("*", MOST_ROWS, Tile(128, 512, 4096)),
    TileRow("*", MOST_ROWS, Tile(128, 2048, 2048)),
)


def weight_only_decode(
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
    tile: Tile = TILES[0].tile,
    out_dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Return ``f((x · input_scale) @ ((codes − zeros) · scales · factor) + bias)``.

    ``y = Σ_g s_g · (x_g @ c_g) − Σ_g (s_g · z_g) · Σ x_g``, sums in float32.

    Args:
        x: ``[M, K]``, any float dtype; multiplied as bfloat16.
        codes: int4, int8 or float8 ``[K', N]``, K' ≥ K; ``[L, K', N]`` with a layer.
        scales: float ``[groups, N]`` or ``[L, groups, N]``.
        zeros: integers like ``scales``, or None.
        layer: int32 scalar: which matrix of the stacks; None when there is one.
        group: rows per scale.
        factor: of all weights.
        bias: ``[N]``, or None.
        input_scale: ``[K]``, or None.
        epilogue: a key of `pallas_kernels.epilogue.ACTIVATIONS`.
        tile: the largest blocks.
        out_dtype: of the result; that of ``x`` by default.
        interpret: as `jax.experimental.pallas.pallas_call` takes it.

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
        operands.append((geometry.sums_spec(), geometry.group_sums(x)))
    if bias is not None:
        operands.append((geometry.bias_spec(), bias[None].astype(jnp.float32)))
    body = functools.partial(
        _body, Flags(geometry, zeros is not None, bias is not None, factor, epilogue)
    )
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


def _body(
    flags: Flags, layer: Any, x: Any, codes: Any, scales: Any, *rest: Any
) -> None:
    """Add one block of K to the sum; after the last, write it."""
    *optional, out, total = rest
    g = flags.geometry
    zeros, sums = optional[:2] if flags.zeros else (None, None)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    scale = scales[...].astype(jnp.float32)
    part = total[...]
    if g.grouped:
        scale = g.masked(scale, g.group)
        part = _grouped(part, x, codes, scale, g)
    else:
        w = codes[...]
        if jnp.issubdtype(w.dtype, jnp.floating):
            w = g.masked(w, 1)
        part += _dot(x[...], w)
    if zeros is not None and sums is not None:
        shift = zeros[...]
        shift = g.masked(shift, g.group) * scale if g.grouped else shift
        part -= jnp.dot(sums[...], shift, precision="highest")
    total[...] = part

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        y = total[...] if g.grouped else total[...] * scale
        y = y * flags.factor if flags.factor != 1.0 else y
        y = y + optional[-1][...] if flags.bias else y
        out[...] = activation(flags.epilogue)(y).astype(out.dtype)


def _grouped(
    part: jax.Array, x: Any, codes: Any, scale: jax.Array, g: Geometry
) -> jax.Array:
    """Add the products of the groups, each scaled."""
    for i in range(g.groups):
        rows = slice(i * g.group, min((i + 1) * g.group, g.k))
        w = codes[rows]
        if g.ragged and jnp.issubdtype(w.dtype, jnp.floating):
            row = jax.lax.broadcasted_iota(jnp.int32, w.shape, 0) + rows.start
            w = jnp.where(row < g.rows_left(), w.astype(jnp.bfloat16), 0)
        part += _dot(x[:, rows], w) * scale[i : i + 1]
    return part


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def declines(p: Problem) -> str | None:
    """Return why the kernel does not take a problem, or None."""
    if p.rows > MOST_ROWS:
        return f"{p.rows} rows: scaling weights is faster beyond {MOST_ROWS}"
    return weight_only_declines(p)


def weight_only_declines(p: Problem) -> str | None:
    """Return why no weight-only kernel takes a problem, or None."""
    if p.rows == 0:
        return "there are no rows"
    if p.activation is not None:
        return f"the activation is rounded to {p.activation}"
    if p.precise:
        return "more precision than bfloat16 factors is asked for"
    if p.group < p.inner and p.group % 32:
        return f"groups of {p.group} are not a multiple of 32"
    return layout_declines(p.coding)


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
    Case("w4 g128", 16, 512, 256, "int4", 128),
    Case("w4 channel", 16, 512, 256, "int4", None),
    Case("w4 g128 zeros", 8, 512, 256, "int4", 128, zeros=True),
    Case("w8 channel zeros", 1, 384, 128, "int8", None, zeros=True),
    Case("w8 g64, float16", 5, 256, 256, "int8", 64, dtype="float16"),
    Case(
        "w4 g32, stacked, float32", 3, 512, 128, "int4", 32, layers=3, dtype="float32"
    ),
    Case(
        "w4 g128, odd, zeros, stacked", 3, 1320, 200, "int4", 128, zeros=True, layers=2
    ),
    Case("fp8 channel, odd", 7, 1301, 77, "float8_e4m3fn", None),
    Case("w4 g128, all options", 4, 512, 256, "int4", 128, options=True),
)


def run(p: Problem, a: Operands, tile: Tile, interpret: Any) -> jax.Array:
    """Run on the operands of a problem."""
    form = stored(p.coding)
    return weight_only_decode(
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


def shifted_zeros(a: Operands, shift: int) -> jax.Array | None:
    """Return zero points for elements: ``value − z = element − (z − shift)``."""
    if a.zeros is None:
        return None if shift == 0 else jnp.full(a.scales.shape, -shift, jnp.int32)
    return a.zeros.astype(jnp.int32) - shift


KERNEL = Kernel(
    "tpu.weight_only_decode",
    "tpu",
    generations("tpu"),
    "tpu",
    declines,
    run,
    TILES,
)
