"""GPU kernels compiled for real chips without any: no spills, few instructions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the `aot` extra")

from benchmarks import gpu_compile
from benchmarks.gpu_schedules import (
    DECODE,
    PREFILL,
    ROWS,
    W8A8,
    attention_code,
    estimate,
)
from pallas_kernels.gpu import (
    embedding,
    quantized_activation,
    triton_quantized_activation,
    triton_weight_only,
    weight_only,
    weight_only_prefill,
)
from pallas_kernels.gpu.cases import FINISHES, Case, signed
from pallas_kernels.gpu.cases import INT8 as EIGHT
from pallas_kernels.kernel import Operands

pytestmark = [
    pytest.mark.aot,
    # since JAX 0.11; there is nothing else for Ampere on 0.10
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]
IDS = [f"{m.KERNEL.name} {case.name}, {case.rows} rows, {gpu}" for m, case, gpu in ROWS]


@pytest.mark.parametrize(("module", "case", "gpu"), ROWS, ids=IDS)
def test_compiles_without_a_spill(module, case, gpu):
    e = estimate(module, case, gpu)
    assert e.code.registers > 0
    assert e.code.spills == 0
    # no float copy of the weight: less than a twentieth of its 128 MiB
    assert e.temporary < 2**27 / 20 + 4 * case.rows * (case.inner + 2 * case.columns)


@pytest.mark.parametrize("rows", [1, 8, 16, 32])
def test_decode_issues_few_instructions_per_weight(rows):
    e = estimate(weight_only, dataclasses.replace(DECODE, rows=rows), "h200")
    assert e.per_weight <= 2.6
    assert e.of_memory > 1


ENDS = [
    (weight_only, DECODE, "h200"),
    (weight_only_prefill, PREFILL, "h200"),
    (quantized_activation, W8A8, "h200"),
    (triton_weight_only, DECODE, "a100"),
    (triton_weight_only, PREFILL, "l4"),
    (triton_quantized_activation, W8A8, "a100"),
]
INT8 = {"activation": "int8"}
FP8 = {"activation": "float8_e4m3fn"}


@pytest.mark.parametrize(
    ("module", "case", "gpu"),
    [
        (weight_only, Case("", 16, 4000, 4096, signed(4), 32, True), "h200"),
        (weight_only, Case("", 16, 4096, 4096, signed(4), 64, **FP8), "h200"),
        (weight_only_prefill, Case("", 256, 4000, 4096, signed(4), 32), "h200"),
        (quantized_activation, Case("", 16, 4000, 4096, EIGHT, **INT8), "h200"),
        (triton_weight_only, Case("", 16, 4000, 4096, signed(4), 32, True), "a100"),
        (triton_weight_only, Case("", 16, 4096, 4096, signed(4), 32, **INT8), "a100"),
        (triton_quantized_activation, Case("", 16, 4000, 64, EIGHT, **INT8), "a100"),
    ],
)
def test_rows_that_fill_no_block_and_rounded_activations_compile(module, case, gpu):
    assert module.declines(case.problem) is None
    assert estimate(module, case, gpu).code.spills == 0


@pytest.mark.parametrize("finish", FINISHES, ids=str)
@pytest.mark.parametrize(("module", "case", "gpu"), ENDS)
def test_a_finished_product_is_one_kernel_without_a_spill(module, case, gpu, finish):
    plain = estimate(module, case, gpu)
    finish = {**finish, "scaled": False}  # which is XLA's
    e = estimate(module, dataclasses.replace(case, **finish), gpu)
    assert e.code.spills == 0
    assert e.launches == plain.launches
    # it is no part of the loop
    assert e.code.per_step <= 1.05 * plain.code.per_step
    # (rounding to 16 bits takes the larger of a number and zero along)
    if finish.get("epilogue") != "relu":
        assert sum(e.code.whole.values()) > sum(plain.code.whole.values())


@pytest.mark.parametrize("tile", [row.tile for row in weight_only.TILES], ids=str)
def test_every_tile_compiles(tile):
    assert estimate(weight_only, DECODE, "h200", tile).code.spills == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gpu", ["h200", "a100", "l4"])
def test_decode_attention_converts_without_the_slow_unit(gpu, bits):
    code = attention_code(gpu, bits)
    assert code.spills == 0
    assert code.loop["I2F"] == code.loop["I2FP"] == 0


def test_stack_is_not_copied():
    """A scan over layers hands the kernel the whole stack and an index."""
    case = dataclasses.replace(DECODE, inner=4096, columns=4096, layers=8)
    words, scales = (8, 32, 4096 * 32), (8, 32, 4096)
    tile = weight_only.KERNEL.tile(case.problem, "sm_90")

    def model(x, words, scales):
        def layer(x, i):
            a = Operands(x, words, scales, layer=i)
            return weight_only.run(case.problem, a, tile, None), None

        return jax.lax.scan(layer, x, jnp.arange(8))[0]

    shapes = [
        jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct(words, jnp.uint16),
        jax.ShapeDtypeStruct(scales, jnp.float32),
    ]
    used = gpu_compile.compiled(model, shapes).memory_analysis()
    assert used.temp_size_in_bytes < 2**20  # one layer's words are 8 MiB


def test_embedding_reads_rows_only():
    coding = signed(4, 128)
    shapes = [
        jax.ShapeDtypeStruct((32, 128256 * 32), jnp.uint16),
        jax.ShapeDtypeStruct((32, 128256), jnp.float32),
        jax.ShapeDtypeStruct((16,), jnp.int32),
    ]
    fn = functools.partial(embedding.gather_columns, coding=coding, group=128)
    used = gpu_compile.compiled(lambda c, s, t: fn(c, s, None, t), shapes)
    assert used.memory_analysis().temp_size_in_bytes < 2**20


def test_tensor_parallel_block_compiles_for_eight():
    """Column- then row-parallel, one sum over devices: Llama 70B's MLP on 8 H200."""
    devices = gpu_compile.mesh("h200", 8)
    inner, wide, rows = 8192, 28672, 16
    up = Case("up", rows, inner, wide // 8, signed(4), 128)
    down = Case("down", rows, wide // 8, inner, signed(4), 128)

    def product(case, x, words, scales):
        tile = weight_only.KERNEL.tile(case.problem, "sm_90")
        return weight_only.run(case.problem, Operands(x, words, scales), tile, None)

    def block(x, w1, s1, w2, s2):
        h = jax.nn.silu(product(up, x, w1, s1))
        return jax.lax.psum(product(down, h, w2, s2), "x")

    columns, inner_rows = P(None, "x"), P("x", None)
    fn = jax.shard_map(
        block,
        mesh=devices,
        in_specs=(P(), columns, columns, inner_rows, inner_rows),
        out_specs=P(),
        check_vma=False,
    )

    def of(shape, dtype, spec):
        sharding = NamedSharding(devices, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = [
        of((rows, inner), jnp.bfloat16, P()),
        of((inner // 128, wide * 32), jnp.uint16, columns),
        of((inner // 128, wide), jnp.float32, columns),
        of((wide // 128, inner * 32), jnp.uint16, inner_rows),
        of((wide // 128, inner), jnp.float32, inner_rows),
    ]
    executable = gpu_compile.lowered(fn, shapes, devices, "h200").compile()
    text = executable.as_text()
    assert "all-reduce" in text
    packed = 2 * (inner * wide // 2) + 2 * 4 * (inner * wide // 128)
    used = executable.memory_analysis().argument_size_in_bytes
    np.testing.assert_allclose(used, packed / 8, rtol=0.05)
