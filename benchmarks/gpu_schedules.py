"""The GPU half of `compile_report`: registers, spills, instructions per weight."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_compile
from benchmarks.gpu_compile import GPUS, Code, Gpu
from benchmarks.report import Table
from pallas_kernels.gpu import (
    decode_attention,
    quantized_activation,
    triton_quantized_activation,
    triton_weight_only,
    weight_only,
    weight_only_prefill,
)
from pallas_kernels.gpu.cases import FP8, INT8, NF4, TABLE8, Case, signed
from pallas_kernels.gpu.layout import Block, filled
from pallas_kernels.kernel import Coding, Operands

ABOUT = """\
GPU kernels, compiled without a GPU. `per weight` counts the instructions that one
thread issues in the innermost loop, per weight it unpacks (or multiplies): a processor
issues 128 per clock. `of the memory` is how many times faster that lets weights be
used than the memory delivers them; below 1, instructions are the limit. Nothing was
timed."""

THREADS = 128  # instructions per clock and processor

SIDE = 8192  # K and N
FEW, MANY = 16, 2048  # rows


def product(name: str, rows: int, coding: Coding, *more: Any, **facts: Any) -> Case:
    """Return a product with a square weight."""
    return Case(name, rows, SIDE, SIDE, coding, *more, **facts)


DECODE = product("w4 g128", FEW, signed(4), 128)
PREFILL = product("w4 g128", MANY, signed(4), 128)
FINISHED = product("w4 g128, silu(y + bias)", FEW, signed(4), 128, bias=True,
                   epilogue="silu")  # fmt: skip
NORMAL = product("nf4 g64", FEW, NF4, 64)
DYNAMIC = product("dynamic8 g64", FEW, TABLE8, 64)
W8A8 = product("w8a8", MANY, INT8, activation="int8")
W4A8 = product("w4a8 g128", FEW, signed(4), 128, activation="int8")
FP8_FP8 = product("fp8 x fp8", MANY, FP8, activation="float8_e4m3fn")

# kernel -> products, GPUs
PLAN: tuple[tuple[Any, tuple[Case, ...], tuple[str, ...]], ...] = (
    (
        weight_only,
        (
            *(dataclasses.replace(DECODE, rows=rows) for rows in (1, 8, 16, 32)),
            FINISHED,
            product("w4 g128 zeros", FEW, signed(4), 128, True),
            product("w4 g128, one of 4 layers", FEW, signed(4), 128, layers=4),
            product("w4 g64", FEW, signed(4), 64),
            product("w4 g32", FEW, signed(4), 32),
            product("w3 g128", FEW, signed(3), 128),
            product("w2 g128", FEW, signed(2), 128),
            product("w8", FEW, INT8),
            NORMAL,
            product("fp8", FEW, FP8),
        ),
        ("h200",),
    ),
    (
        weight_only_prefill,
        (PREFILL, dataclasses.replace(FINISHED, rows=MANY)),
        ("h200",),
    ),
    (quantized_activation, (W8A8, W4A8, FP8_FP8), ("h200",)),
    (triton_weight_only, (DECODE, FINISHED, PREFILL, NORMAL), ("a100", "l4")),
    (triton_weight_only, (DYNAMIC,), ("a100", "l4", "h200")),
    (triton_quantized_activation, (W8A8, W4A8), ("a100", "l4")),
    (triton_quantized_activation, (FP8_FP8,), ("l4",)),
)
ROWS = tuple(
    (module, case, gpu)
    for module, cases, gpus in PLAN
    for case in cases
    for gpu in gpus
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a kernel's machine code says.

    Attributes:
        code: of the kernel.
        per_weight: instructions of a thread per weight of the innermost loop.
        of_memory: how much faster than the memory instructions let weights be used.
        temporary: bytes beyond arguments and results.
        launches: kernels, this one and XLA's own.
    """

    code: Code
    per_weight: float
    of_memory: float
    temporary: int
    launches: int


@functools.cache
def estimate(module: Any, case: Case, gpu: str, tile: Any = None) -> Estimate:
    """Compile a case for a GPU and count."""
    p, chip = case.problem, GPUS[gpu]
    tile = module.KERNEL.tile(p, chip.generation) if tile is None else tile
    shapes = {name: a for name, a in _shapes(case).items() if a is not None}
    options = _options(case)

    def multiply(arrays: list[jax.Array], vectors: list[jax.Array]) -> jax.Array:
        given = Operands(**dict(zip(shapes, arrays, strict=True)))
        more = dict(zip(options, vectors, strict=True))
        return module.run(p, given, tile, None, **more, epilogue=case.epilogue)

    arguments = [list(shapes.values()), list(options.values())]
    executable = gpu_compile.compiled(multiply, arguments, gpu)
    code = gpu_compile.code(executable)
    weights = _weights_per_turn(case, tile, code)
    return Estimate(
        code,
        code.per_step / weights,
        THREADS / (code.per_step / weights) / _delivered(case, chip),
        executable.memory_analysis().temp_size_in_bytes,
        len(re.findall(r" (?:fusion|custom-call)\(", executable.as_text())),
    )


def _shapes(case: Case) -> dict[str, Any]:
    """Return the shapes of a case's operands."""
    p, block = case.problem, Block(case.coding.bits)
    lead = () if p.layers is None else (p.layers,)
    blocks = filled(p.inner, p.coding.bits) // block.rows
    words = (*lead, blocks * block.slabs, 32 * p.columns)
    scales = (*lead, -(-p.inner // p.group), p.columns)
    whole = jnp.uint8 if p.coding.lowest == 0 else jnp.int8
    of = jax.ShapeDtypeStruct
    return {
        "x": of((p.rows, p.inner), jnp.dtype(p.dtype)),
        "codes": of(words, jnp.uint16),
        "scales": of(scales, jnp.float32),
        "zeros": of(scales, whole) if p.zeros else None,
        "x_scale": of((p.rows, 1), jnp.float32) if p.activation else None,
        "layer": of((), jnp.int32) if lead else None,
    }


def _options(case: Case) -> dict[str, Any]:
    """Return the shapes of a case's bias and input scale."""
    shapes = {}
    if case.bias:
        shapes["bias"] = jax.ShapeDtypeStruct((case.columns,), jnp.float32)
    if case.scaled:
        shapes["input_scale"] = jax.ShapeDtypeStruct((case.inner,), jnp.float32)
    return shapes


def _weights_per_turn(case: Case, tile: Any, code: Code) -> float:
    """Return the weights of a turn of the loop, per thread that works on them."""
    rows = Block(case.coding.bits).rows
    if hasattr(tile, "warpgroups"):
        # a warpgroup of 128 threads has 64 or 128 columns
        step = rows
        inner = filled(case.inner, case.coding.bits)
        while step < tile.inner and inner % (2 * step) == 0:
            step *= 2
        return step * tile.columns / 128
    return rows * tile.columns / (32 * tile.warps)


def _delivered(case: Case, chip: Gpu) -> float:
    """Return the weights per clock that the memory delivers to a processor."""
    stored = case.coding.bits / 8 + 4 / (case.group or case.inner)
    return chip.bandwidth / stored / (chip.clock * 1e9) / chip.processors


def attention_code(gpu: str, bits: int) -> Code:
    """Return the machine code of decode attention over 8192 tokens."""
    q = jax.ShapeDtypeStruct((8, 8, 8, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8, 8, 8192, 128 * bits // 8), jnp.uint8)
    scales = jax.ShapeDtypeStruct((8, 8, 8192), jnp.float32)
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    fn = functools.partial(decode_attention.decode_attention, bits=bits)
    shapes = [q, cache, cache, scales, scales, lengths]
    return gpu_compile.code(gpu_compile.compiled(fn, shapes, gpu))


def tables() -> list[Table]:
    """Return the table of all kernels."""
    rows = []
    for module, case, gpu in ROWS:
        e = estimate(module, case, gpu)
        few = case.rows <= 32
        rows.append((
            module.KERNEL.name.removeprefix("gpu."), case.name, GPUS[gpu].generation,
            str(case.rows), str(e.code.registers), str(e.code.spills),
            str(e.code.per_step), f"{e.per_weight:.2f}",
            f"{e.of_memory:.2f}" if few else "-",
        ))  # fmt: skip
    for gpu in ("h200", "a100", "l4"):
        for bits in (8, 4):
            code = attention_code(gpu, bits)
            rows.append((
                "decode_attention", f"int{bits} cache", GPUS[gpu].generation, "8",
                str(code.registers), str(code.spills), str(code.per_step), "-", "-",
            ))  # fmt: skip
    columns = ("kernel", "product", "for", "rows", "registers", "spills", "loop",
               "per weight", "of the memory")  # fmt: skip
    return [Table(f"GPU kernels, jax {jax.__version__}", columns, rows)]
