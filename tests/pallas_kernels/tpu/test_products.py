"""TPU products in the simulator of memory, copies and semaphores, with fresh inputs.

Uninitialized memory is NaN and races are errors, so a block that is read before it is
written, or hangs over an edge without a mask, cannot pass.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.reference import Case
from tests import private_jax

MODULES = ("weight_only_decode", "weight_only_prefill", "quantized_activation")
PLAIN = {
    "weight_only_decode": ("w4 g128, odd, zeros, stacked", "w4 g128, all options"),
    "weight_only_prefill": ("w4 g64, odd, stacked",),
    "quantized_activation": ("w8a8 zeros, stacked, odd", "fp8 x int4 g128"),
}
SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
HALF_ULP = 2.0**-9  # of bfloat16


def cases():
    for module in MODULES:
        kernel = importlib.import_module(f"pallas_kernels.tpu.{module}")
        for case in kernel.CASES:
            marks = () if case.name in PLAIN[module] else pytest.mark.slow
            yield pytest.param(module, case, marks=marks, id=f"{module}: {case.name}")


def roundings(module: str, case) -> int:
    """How often a factor is rounded to bfloat16 on its way into the product."""
    if case.rounded is not None:
        return 0
    return (case.dtype != "bfloat16") + (module == "weight_only_prefill")


@pytest.mark.parametrize(("module", "case"), list(cases()))
def test_product_is_the_reference_up_to_its_roundings(module, case):
    check(module, case, roundings(module, case))


def test_rounded_scales_are_one_more_rounding():
    case = Case("w4 g64 zeros", 16, 512, 128, "int4", 64, zeros=True)
    flags = {"through_bfloat16": True, "rounded_scales": True}
    check("weight_only_prefill", case, 2, **flags)


def check(module, case, rounded, **flags):
    """Hold a product to how often its factors are rounded to bfloat16."""
    kernel = importlib.import_module(f"pallas_kernels.tpu.{module}")
    # small blocks: several of each kind, the last ones over the edge
    tile = kernel.Tile(16, 128, 256 if case.group_rows < 64 else 512, **flags)
    arguments, options = case.arrays(seed=7)
    run = jax.jit(
        lambda *a: getattr(kernel, module)(
            *a, **options, tile=tile, out_dtype=jnp.float32, interpret=SIMULATED
        )
    )
    y = np.asarray(run(*arguments), np.float64)
    assert not private_jax.tpu_races_found()
    exact = np.asarray(kernel.reference(*arguments, **options), np.float64)
    x, codes, scales, zeros, layer = arguments
    # the sum of the magnitudes of all terms
    plain = {k: v for k, v in options.items() if k in ("group", "factor")}
    zeros = None if zeros is None else -np.abs(zeros)
    terms = kernel.reference(
        np.abs(np.asarray(x, np.float32)) * np.abs(options.get("input_scale", 1)),
        jnp.abs(codes.astype(jnp.float32)), scales, zeros, layer, **plain
    )  # fmt: skip
    each = rounded * HALF_ULP + case.inner * 2.0**-24
    slope = 1.1 if case.options else 1.0  # of silu, at most
    assert y.shape == (case.rows, case.columns)
    assert np.all(np.abs(y - exact) <= slope * each * np.asarray(terms) + 1e-6)
    assert np.linalg.norm(y - exact) <= 2 * HALF_ULP * np.linalg.norm(exact)


def test_the_result_has_the_dtype_asked_for():
    kernel = importlib.import_module("pallas_kernels.tpu.weight_only_decode")
    arguments, options = kernel.CASES[4].arrays()
    out = jax.eval_shape(
        lambda *a: kernel.weight_only_decode(*a, **options), *arguments
    )
    assert out.dtype == jnp.float16
