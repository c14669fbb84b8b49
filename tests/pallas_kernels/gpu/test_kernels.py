"""Every GPU kernel on its cases, interpreted, against products in float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import (
    cases,
    decode_attention,
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
ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-16}


def check(module, case, tile=None, seed=0):
    problem, operands = case.problem, case.operands(seed)
    assert module.declines(problem) is None
    tile = tile or module.KERNEL.tile(problem, module.KERNEL.generations[-1])
    hopper = module in HOPPER
    interpret = private_jax.gpu_interpreter() if hopper else True
    y = module.run(problem, operands, tile, interpret)
    assert not (hopper and private_jax.races_found())
    compare(module, problem, operands, y)


def compare(module, problem, operands, y):
    """Hold a result to what rounding can have done."""
    assert y.dtype == problem.out_dtype
    expected = np.asarray(cases.reference(problem, operands))
    error = np.abs(np.asarray(y, np.float32) - expected)
    # products are exact, and their sums nearly
    unit, most = ULP[problem.out_dtype], np.max(np.abs(expected))
    allowed = unit * np.abs(expected) + 1e-5 * most
    if module is weight_only_prefill:
        allowed = allowed + rounded_weights(problem, operands, 2 * unit)
    assert np.all(error <= allowed), float(np.max(error / allowed))
    # no bound of the worst case hides a mistake: nearly all is rounding of the result
    assert np.median(error) <= 2e-3 * most


def rounded_weights(problem, operands, unit):
    """The most that rounding scales and weights to 16 bits can do."""
    eye = np.eye(problem.inner, dtype=np.float32)
    plain = dataclasses.replace(operands, x=jnp.asarray(eye))
    weights = np.abs(np.asarray(cases.reference(problem, plain)))
    return unit * np.abs(np.asarray(operands.x, np.float32)) @ weights


@pytest.mark.parametrize(("module", "case"), cases_of(HOPPER))
def test_mosaic_kernel_is_the_reference(module, case):
    check(module, case)


@pytest.mark.parametrize(("module", "case"), cases_of(TRITON))
def test_triton_kernel_is_the_reference(module, case):
    check(module, case)


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


@pytest.mark.parametrize("case", decode_attention.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "tile", [decode_attention.Tile(32, 4), decode_attention.Tile()]
)
def test_decode_attention_is_the_reference(case, tile):
    arrays = case.arrays()
    y = decode_attention.decode_attention(
        *arrays, bits=case.bits, tile=tile, interpret=True
    )
    expected = np.asarray(decode_attention.reference(*arrays, bits=case.bits))
    assert y.shape == expected.shape
    # queries and probabilities are rounded to bfloat16
    error = np.abs(np.asarray(y, np.float32) - expected)
    assert np.max(error) <= 2.0**-7 * np.max(np.abs(expected))


def test_decode_attention_reads_nothing_past_the_length():
    case = decode_attention.CASES[0]
    q, keys, values, key_scales, value_scales, _ = case.arrays()
    lengths = jnp.asarray([37, 130], jnp.int32)
    inside = (jnp.arange(case.tokens) < lengths[:, None])[:, None]
    outputs = [
        decode_attention.decode_attention(
            *(q, keys, values),
            jnp.where(inside, key_scales, beyond),
            jnp.where(inside, value_scales, beyond),
            lengths,
            bits=8,
            tile=decode_attention.Tile(32, 4),
            interpret=True,
        )
        for beyond in (0.0, 1e4)
    ]
    np.testing.assert_array_equal(*outputs)


def test_decode_attention_refuses_other_codes():
    with pytest.raises(ValueError, match="bits=3: a cache has codes of 4 or 8 bits"):
        decode_attention.decode_attention(*decode_attention.CASES[0].arrays(), bits=3)


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
    rounded = dataclasses.replace(few, activation="int8")
    three = dataclasses.replace(rounded, coding=signed(3), inner=512)
    reasons = {
        (weight_only_prefill, few): "4 rows: scaling partial sums",
        (weight_only, cut): "groups of 96 are not 32 · 2^n rows",
        (weight_only, ragged): "groups of 96 do not divide 256 rows",
        (weight_only, table): "a table of 256 numbers",
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
