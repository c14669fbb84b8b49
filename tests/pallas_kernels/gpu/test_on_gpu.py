"""Every kernel for the GPU of this machine, compiled and run: `JAXQ_TEST_GPU=1`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import decode_attention, lookup_product
from tests.pallas_kernels.gpu.test_kernels import HOPPER, TRITON, compare, finished

pytestmark = pytest.mark.gpu


def generation():
    return "sm_" + str(jax.devices()[0].compute_capability).replace(".", "")


@pytest.mark.parametrize("module", HOPPER + TRITON, ids=lambda m: m.KERNEL.name)
def test_kernel_is_the_reference(module):
    if generation() not in module.KERNEL.generations:
        pytest.skip(f"{module.KERNEL.name} is not for {generation()}")
    for case in (*module.CASES, *finished(module)):
        problem, operands, options = case.problem, case.operands(), case.options()
        if module.KERNEL.refuses(problem, generation()):
            continue
        for row in module.KERNEL.tiles:
            y = module.run(problem, operands, row.tile, None, **options)
            compare(module, problem, operands, y, **options)


@pytest.mark.parametrize("tile", decode_attention.TILES, ids=str)
def test_decode_attention_is_the_reference(tile):
    for case in decode_attention.CASES:
        arrays = case.arrays()
        y = decode_attention.decode_attention(*arrays, bits=case.bits, tile=tile)
        expected = np.asarray(decode_attention.reference(*arrays, bits=case.bits))
        error = np.abs(np.asarray(y.astype(jnp.float32)) - expected)
        assert np.max(error) <= 2.0**-7 * np.max(np.abs(expected))


def test_lookup_product_is_the_reference():
    for case in lookup_product.CASES:
        arrays = case.arrays()
        y = lookup_product.lookup_product(*arrays)
        expected = lookup_product.reference(*arrays)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
