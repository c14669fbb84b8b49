"""Every Mosaic GPU kernel on its cases, interpreted, against float32 products."""

import numpy as np
import pytest

from pallas_kernels.gpu import cases, weight_only
from tests import private_jax

MODULES = (weight_only,)
ALL = [(module, case) for module in MODULES for case in module.CASES]

# What rounds: the result, to its dtype; the factors of a float32 activation.
ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-16}


def check(module, case, tile=None, seed=0):
    problem, operands = case.problem, case.operands(seed)
    assert module.declines(problem) is None
    tile = tile or module.KERNEL.tile(problem, "sm_90")
    y = module.run(problem, operands, tile, private_jax.gpu_interpreter())
    assert not private_jax.races_found()
    assert y.dtype == problem.out_dtype
    expected = np.asarray(cases.reference(problem, operands))
    error = np.abs(np.asarray(y, np.float32) - expected)
    # each product is exact; sums of K of them lose a little more than the result
    allowed = ULP[problem.out_dtype] * np.abs(expected) + 1e-5 * np.max(
        np.abs(expected)
    )
    assert np.all(error <= allowed), (error / np.max(np.abs(expected))).max()


@pytest.mark.parametrize(
    ("module", "case"), ALL, ids=[f"{m.KERNEL.name}: {c.name}" for m, c in ALL]
)
def test_kernel_is_the_reference(module, case):
    check(module, case)
