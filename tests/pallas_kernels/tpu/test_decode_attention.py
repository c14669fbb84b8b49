"""Attention over a quantized cache, in the simulator, against float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import decode_attention as kernel

SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize("case", kernel.CASES, ids=lambda c: c.name)
def test_attention_is_the_reference_up_to_bfloat16(case):
    arguments = case.arrays(seed=11)
    run = functools.partial(
        kernel.decode_attention, tile=kernel.Tile(512), interpret=SIMULATED
    )
    y = np.asarray(jax.jit(run)(*arguments), np.float64)
    exact = np.asarray(jax.jit(kernel.reference)(*arguments), np.float64)
    assert np.all(y[0] == 0)  # no positions
    # a probability, a scaled query and the result are rounded to bfloat16; a score of
    # magnitude s changes its probability by s roundings
    scores = 4 * case.width**0.5
    most = 2.0**-9 * (scores / 4 + 2)
    assert np.linalg.norm(y - exact) <= most * np.linalg.norm(exact)
    assert np.abs(y - exact).max() <= 4 * most * np.abs(exact).max()


def test_what_lies_behind_the_end_does_not_matter():
    case = kernel.CASES[0]
    arguments = case.arrays(seed=1)
    run = functools.partial(
        kernel.decode_attention, tile=kernel.Tile(512), interpret=SIMULATED
    )
    y = run(*arguments)
    ends = arguments[5]
    behind = jnp.arange(case.positions)[None, None] >= ends[:, None, None]
    arguments[3] = jnp.where(behind, jnp.nan, arguments[3])
    arguments[4] = jnp.where(behind, jnp.nan, arguments[4])
    np.testing.assert_array_equal(run(*arguments), y)


def test_heads_that_do_not_divide_are_refused():
    arguments = kernel.CASES[0].arrays()
    arguments[0] = arguments[0][:, :5]
    with pytest.raises(ValueError, match="5 heads, no multiple of the cache's 2"):
        kernel.decode_attention(*arguments)
