"""The TPU half of `benchmarks.compile_report`: clocks per grid step, and the roof."""

import dataclasses
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tpu_compile
from benchmarks.report import Table
from benchmarks.tpu_compile import CHIPS, Schedule
from pallas_kernels.tpu import decode_attention as attention
from pallas_kernels.tpu.geometry import Geometry

SIZE = 8192  # K and N
ROWS = {"decode": 16, "prefill": 2048}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product ``x[M, 8192] @ w[8192, 8192]`` to compile.

    Attributes:
        name: of the row.
        kernel: the module.
        phase: a key of `ROWS`.
        weight: the dtype of the elements.
        group: rows per scale, or None.
        zeros: whether there are zero points.
        scale: the dtype of the scales.
        rounded: what the activation is rounded to.
    """

    name: str
    kernel: str
    phase: str
    weight: str
    group: int | None = None
    zeros: bool = False
    scale: str = "bfloat16"
    rounded: str | None = None


DECODE, PREFILL = "weight_only_decode", "weight_only_prefill"
ROUNDED = "quantized_activation"
FP8 = "float8_e4m3fn"
PRODUCTS = (
    Product("bf16 decode", PREFILL, "decode", "bfloat16"),
    Product("W4A16 g128", DECODE, "decode", "int4", 128),
    Product(
        "W4A16 g128, float32 scales", DECODE, "decode", "int4", 128, scale="float32"
    ),
    Product("W4A16 g128, zeros", DECODE, "decode", "int4", 128, zeros=True),
    Product("W4A16 g64", DECODE, "decode", "int4", 64),
    Product("W4A16 g32", DECODE, "decode", "int4", 32),
    Product("W4A16 channel", DECODE, "decode", "int4"),
    Product("W8A16 channel", DECODE, "decode", "int8"),
    Product("fp8 weights", DECODE, "decode", FP8),
    Product("W8A8", ROUNDED, "decode", "int8", rounded="int8"),
    Product("W4A8 g128", ROUNDED, "decode", "int4", 128, rounded="int8"),
    Product("fp8 x int4 g128", ROUNDED, "decode", "int4", 128, rounded=FP8),
    Product("fp8 x fp8", ROUNDED, "decode", FP8, rounded=FP8),
    Product("bf16 prefill", PREFILL, "prefill", "bfloat16"),
    Product("W4A16 g128", PREFILL, "prefill", "int4", 128),
    Product(
        "W4A16 g128, float32 scales", PREFILL, "prefill", "int4", 128, scale="float32"
    ),
    Product("W4A16 channel", PREFILL, "prefill", "int4"),
    Product("W8A16 channel", PREFILL, "prefill", "int8"),
    Product("W8A8", ROUNDED, "prefill", "int8", rounded="int8"),
    Product("W4A8 g128", ROUNDED, "prefill", "int4", 128, rounded="int8"),
    Product("fp8 x fp8", ROUNDED, "prefill", FP8, rounded=FP8),
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a compiled product would take, if data always came in time.

    Attributes:
        schedule: the body of the grid loop.
        steps: of the grid.
        weight_clocks: that the memory needs for a step's elements.
        seconds: that all steps issue, or the roof where that is later.
        roof: the least that memory and matrix unit allow: bytes of the weight over
            bandwidth, operations over the peak of their dtype.
    """

    schedule: Schedule
    steps: int
    weight_clocks: float
    seconds: float
    roof: float


def estimate(product: Product, generation: str) -> Estimate:
    """Compile a product for a chip and estimate its time."""
    module = importlib.import_module(f"pallas_kernels.tpu.{product.kernel}")
    chip, rows = CHIPS[generation], ROWS[product.phase]
    tile = next(r.tile for r in module.TILES if r.fits(generation, rows))
    group = SIZE if product.group is None else product.group
    array = jax.ShapeDtypeStruct
    groups = (SIZE // group, SIZE)
    arguments = [
        array((rows, SIZE), jnp.bfloat16),
        array((SIZE, SIZE), product.weight),
        array(groups, product.scale),
        array(groups, jnp.int32) if product.zeros else None,
        array((rows, 1), jnp.float32) if product.rounded else None,
    ]
    options: dict[str, Any] = {"group": group, "tile": tile}

    def fn(x: Any, codes: Any, scales: Any, zeros: Any, x_scale: Any) -> jax.Array:
        more = (
            {} if x_scale is None else {"x_scale": x_scale, "rounded": product.rounded}
        )
        run = getattr(module, product.kernel)
        return run(x, codes, scales, zeros, **options, **more)

    schedule = tpu_compile.schedule(fn, arguments, generation)
    geometry = Geometry.of(
        *arguments[:1], array((1, SIZE, SIZE), product.weight), group, tile
    )
    bits = _bits(product.weight)
    clocks = geometry.k * geometry.n * bits / 8 / chip.bandwidth * chip.clock
    nbytes = SIZE * SIZE * bits / 8
    nbytes += (
        math.prod(groups) * jnp.dtype(product.scale).itemsize * (1 + product.zeros)
    )
    peak = chip.peak * (2 if product.rounded in chip.doubled else 1)
    roof = max(nbytes / chip.bandwidth, 2 * rows * SIZE * SIZE / peak)
    steps = math.prod(geometry.grid)
    seconds = max(steps * schedule.bundles / chip.clock, roof)
    return Estimate(schedule, steps, clocks, seconds, roof)


def _bits(dtype: str) -> int:
    kind = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return kind(dtype).bits


def attention_estimate(dtype: str, generation: str) -> tuple[Schedule, float]:
    """Return the schedule of decode attention, and the clocks that its cache needs."""
    array, heads, positions = jax.ShapeDtypeStruct, 8, 8192
    cache, scales = (8, heads, positions, 128), (8, heads, positions)
    arguments = [
        array((8, 64, 128), jnp.bfloat16),
        *(array(cache, dtype) for _ in range(2)),
        *(array(scales, jnp.float32) for _ in range(2)),
        array((8,), jnp.int32),
    ]
    fn = functools.partial(attention.decode_attention)
    schedule = tpu_compile.schedule(fn, arguments, generation)
    nbytes = attention.TILES[0].positions * (2 * 128 * _bits(dtype) / 8 + 2 * 4)
    chip = CHIPS[generation]
    return schedule, nbytes / chip.bandwidth * chip.clock


def tables() -> Iterator[Table]:
    """Yield one table per chip."""
    columns = ("kernel", "bundles", "memory", "steps", "us", "% of roof", "/ bf16")
    for generation in CHIPS:
        rows: list[list[str]] = []
        dense: dict[str, float] = {}
        for product in PRODUCTS:
            e = estimate(product, generation)
            dense.setdefault(product.phase, e.seconds)
            rows.append(
                [
                    f"{product.name}, {ROWS[product.phase]} rows",
                    f"{e.schedule.bundles}",
                    f"{e.weight_clocks:.0f}",
                    f"{e.steps}",
                    f"{e.seconds * 1e6:.0f}",
                    f"{100 * e.roof / e.seconds:.0f}",
                    f"{e.seconds / dense[product.phase]:.2f}",
                ]
            )
        for dtype in ("int8", "int4"):
            schedule, clocks = attention_estimate(dtype, generation)
            share = 100 * min(1, clocks / schedule.bundles)
            name = f"attention, {dtype} cache, 8192 positions"
            cells = [
                name,
                f"{schedule.bundles}",
                f"{clocks:.0f}",
                "",
                "",
                f"{share:.0f}",
            ]
            rows.append([*cells, ""])
        yield Table(f"## TPU {generation}", columns, rows)


ABOUT = """\
TPU: `bundles` are the clocks that one grid step issues, conditional parts included, the
waiting of the matrix unit not; `memory` the clocks in which the chip's memory delivers
the step's elements (or its part of the cache). `us` is for K = N = 8192: what all steps
issue, or the roof, whichever is later. The roof is the bytes of the weight, scales
included, over bandwidth, or operations over the peak of their dtype; `/ bf16` compares
with bfloat16 weights in the same kernel, for the same chip."""
