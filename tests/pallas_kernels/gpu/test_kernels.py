"""Every GPU kernel on its cases, interpreted, against products in float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import (
    cases,
    embedding,
    lookup_product,
    quantized_activation,
    triton_grid,
    triton_quantized_activation,
    triton_weight_only,
    weight_only,
    weight_only_prefill,
)
from pallas_kernels.gpu.cases import Case, signed
from tests import private_jax

HOPPER = (weight_only, weight_only_prefill, quantized_activation)
TRITON = (triton_weight_only, triton_quantized_activation)
# Interpreting takes seconds per case: these few always run, the rest when asked for.
ALWAYS = {
    (weight_only, "w4 g32 zeros, odd K, stacked"),
    (weight_only, "fp8 x int4 g64"),
    (weight_only_prefill, "w4 g32, float16"),
    (quantized_activation, "w8a8, odd, stacked"),
    (quantized_activation, "w4a8 zeros, odd K"),
    (triton_weight_only, "w3a8 g128 zeros"),
    (triton_weight_only, "w4 g32 zeros, odd K, stacked"),
    (triton_quantized_activation, "w4a8 g128 zeros"),
}


def cases_of(modules):
    return [
        pytest.param(
            module,
            case,
            id=f"{module.KERNEL.name}: {case.name}",
            marks=() if (module, case.name) in ALWAYS else pytest.mark.aot,
        )
        for module in modules
        for case in module.CASES
    ]


# Half a unit in the last place of what is rounded: the result, or a float32
# activation's two parts.
STEEPEST = 1.13  # slope of an epilogue: gelu's
ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-16}


def check(module, case, tile=None, seed=0):
    problem, operands = case.problem, case.operands(seed)
    assert module.declines(problem) is None
    tile = tile or module.KERNEL.tile(problem, module.KERNEL.generations[-1])
    hopper = module in HOPPER
    interpret = private_jax.gpu_interpreter() if hopper else True
    options = case.options(seed)
    y = module.run(problem, operands, tile, interpret, **options)
    assert not (hopper and private_jax.races_found())
    compare(module, problem, operands, y, **options)


def compare(module, problem, operands, y, **options):
    """Hold a result to what rounding can have done."""
    assert y.dtype == problem.out_dtype
    expected = np.asarray(cases.reference(problem, operands, **options))
    error = np.abs(np.asarray(y, np.float32) - expected)
    # products are exact, and their sums nearly
    unit, most = ULP[problem.out_dtype], np.max(np.abs(expected))
    allowed = unit * np.abs(expected) + 1e-5 * most
    if module is weight_only_prefill:
        allowed = allowed + rounded_weights(problem, operands, 2 * unit, options)
    if options and problem.dtype == "float32":
        # its two parts are short of a sum that a bias may cancel
        scale = {"input_scale": options.get("input_scale")}
        sums = cases.reference(problem, operands, **scale)
        allowed = allowed + STEEPEST * unit * np.abs(np.asarray(sums))
    assert np.all(error <= allowed), float(np.max(error / allowed))
    # no bound of the worst case hides a mistake: nearly all is rounding of the result
    assert np.median(error) <= 2e-3 * most


def rounded_weights(problem, operands, unit, options):
    """The most that rounding scales and weights to 16 bits can do."""
    eye = np.eye(problem.inner, dtype=np.float32)
    plain = dataclasses.replace(operands, x=jnp.asarray(eye))
    weights = np.abs(np.asarray(cases.reference(problem, plain)))
    x = np.asarray(operands.x, np.float32) * options.get("input_scale", 1.0)
    return STEEPEST * unit * np.abs(x) @ weights


@pytest.mark.parametrize(("module", "case"), cases_of(HOPPER))
def test_mosaic_kernel_is_the_reference(module, case):
    check(module, case)


@pytest.mark.parametrize(("module", "case"), cases_of(TRITON))
def test_triton_kernel_is_the_reference(module, case):
    check(module, case)


ROUNDED = {"activation": "int8"}
SMALL = {  # kernel -> a product of several tiles, and the dtypes that it takes
    weight_only: (Case("", 3, 128, 256, signed(4), 64), ULP),
    weight_only_prefill: (Case("", 65, 128, 128, signed(4), 64), list(ULP)[:2]),
    quantized_activation: (Case("", 130, 128, 128, signed(4), **ROUNDED), ULP),
    triton_weight_only: (Case("", 3, 128, 128, signed(4), 64), ULP),
    triton_quantized_activation: (Case("", 130, 128, 72, signed(4), **ROUNDED), ULP),
}


# these always run
BRIEF = {(m, "bfloat16", str(cases.FINISHES[3])) for m in (weight_only, *TRITON)}


def finished(module):
    """Every dtype, and every end of a product."""
    case, dtypes = SMALL[module]
    return [
        dataclasses.replace(case, name=str(more), dtype=dtype, **more)
        for dtype in dtypes
        for more in cases.FINISHES
    ]


@pytest.mark.parametrize(
    ("module", "case"),
    [
        pytest.param(
            module,
            case,
            id=f"{module.KERNEL.name}, {case.dtype}, {case.name}",
            marks=() if (module, case.dtype, case.name) in BRIEF else pytest.mark.aot,
        )
        for module in SMALL
        for case in finished(module)
    ],
)
def test_bias_input_scale_and_epilogue(module, case):
    check(module, case)


@pytest.mark.parametrize("module", SMALL, ids=lambda m: m.KERNEL.name)
def test_unknown_epilogues_are_refused(module):
    case = SMALL[module][0]
    tile = module.KERNEL.tile(case.problem, module.KERNEL.generations[-1])
    with pytest.raises(
        ValueError, match="epilogue='swish' must be one of None, 'relu'"
    ):
        module.run(case.problem, case.operands(), tile, None, epilogue="swish")


@pytest.mark.aot
@pytest.mark.parametrize("splits", [2])
def test_parts_of_k_add_up(splits):
    case = Case("split", 5, 1024, 64, signed(4), 128, zeros=True)
    check(triton_weight_only, case, triton_grid.Tile(splits=splits))
    check(weight_only, case, weight_only.Tile(8, 1, 128, 2, splits))


@pytest.mark.aot
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_ring_of_any_length(stages, seed):
    """More steps than buffers, other numbers: a race would show."""
    case = Case("ring", 9, 640, 128, signed(4), 128, zeros=True)
    check(weight_only, case, weight_only.Tile(16, 2, 128, stages), seed)


@pytest.mark.parametrize("case", lookup_product.CASES, ids=lambda case: case.name)
def test_lookup_product_is_the_reference(case):
    x, bits, scales = case.arrays()
    tile = lookup_product.Tile(64, 2)
    y = lookup_product.lookup_product(x, bits, scales, tile=tile, interpret=True)
    expected = lookup_product.reference(x, bits, scales)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_lookup_product_refuses_groups_that_cut_bytes():
    x, bits, scales = lookup_product.CASES[0].arrays()
    with pytest.raises(ValueError, match="3 groups do not divide 32 bytes of K = 256"):
        lookup_product.lookup_product(x, bits, jnp.ones((2, 3, 128)))
    del scales


@pytest.mark.parametrize(
    "case",
    [
        Case("int4 zeros", 1, 256, 50, signed(4), 64, zeros=True),
        Case("nf4", 1, 128, 50, cases.NF4, 32),
        Case("int8", 1, 64, 50, cases.INT8),
    ],
    ids=lambda case: case.name,
)
def test_embedding_is_columns_of_the_weight(case):
    p, a = case.problem, case.operands()
    tokens = jnp.asarray([3, 49, 3, 0], jnp.int32)
    found = embedding.gather_columns(
        a.codes, a.scales, a.zeros, tokens, coding=p.coding, group=p.group,
        dtype=jnp.float32,
    )  # fmt: skip
    eye = dataclasses.replace(a, x=jnp.eye(p.inner, dtype=jnp.float32))
    weight = np.asarray(cases.reference(p, eye))
    np.testing.assert_allclose(found, weight[:, np.asarray(tokens)].T, rtol=1e-2)


def test_who_declines_what():
    few = Case("", 4, 256, 64, signed(4), 128).problem
    cut = dataclasses.replace(few, group=96, inner=384)
    ragged = dataclasses.replace(few, group=96)
    table = dataclasses.replace(few, coding=cases.Coding("table", 8, 1))
    many = dataclasses.replace(table, rows=65)
    eight = dataclasses.replace(few, coding=cases.Coding("table", 3, 32))
    rounded = dataclasses.replace(few, activation="int8")
    three = dataclasses.replace(rounded, coding=signed(3), inner=512)
    reasons = {
        (weight_only_prefill, few): "4 rows: scaling partial sums",
        (weight_only, cut): "groups of 96 are not 32 · 2^n rows",
        (weight_only, ragged): "groups of 96 do not divide 256 rows",
        (weight_only, table): "a table of 256 numbers; registers hold 16",
        (weight_only_prefill, many): "a table of 256 numbers; registers hold 16",
        (triton_weight_only, eight): "a table of 8 numbers; 16 or 256 can be",
        (quantized_activation, few): "the activation stays float",
        (quantized_activation, three): "3-bit codes do not lie four to a register",
    }
    for (module, problem), reason in reasons.items():
        assert reason in (module.declines(problem) or "")


@pytest.mark.parametrize(
    ("module", "generation", "reason"),
    [
        (triton_quantized_activation, "sm_80", "sm_80 does not multiply fp8 by fp8"),
        (triton_quantized_activation, "sm_86", "sm_86 does not multiply fp8 by fp8"),
        (triton_quantized_activation, "sm_89", None),
        (triton_quantized_activation, "sm_90", "not for sm_90"),
        (quantized_activation, "sm_90", None),
    ],
)
def test_fp8_products_go_only_where_the_chip_has_them(module, generation, reason):
    case = next(case for case in module.CASES if case.activation == "float8_e4m3fn")
    assert module.KERNEL.refuses(case.problem, generation) == reason
    integers = next(case for case in module.CASES if case.activation == "int8")
    taken = module.KERNEL.refuses(integers.problem, generation) is None
    assert taken == (generation in module.KERNEL.generations)
