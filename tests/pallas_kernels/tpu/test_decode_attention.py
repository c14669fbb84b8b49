"""Attention over a quantized cache, in the simulator, against float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import decode_attention as kernel
from tests import private_jax

SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize(
    "case",
    # the last one's bias is seen in tests/kvcache, too
    [*kernel.CASES[:-1], pytest.param(kernel.CASES[-1], marks=pytest.mark.slow)],
    ids=lambda c: c.name,
)
def test_attention_is_the_reference_up_to_bfloat16(case):
    arguments, options = case.arrays(seed=11), case.options(seed=11)
    run = functools.partial(
        kernel.decode_attention, tile=kernel.Tile(512), interpret=SIMULATED, **options
    )
    reference = functools.partial(kernel.reference, **options)
    y = np.asarray(jax.jit(run)(*arguments), np.float64)
    assert not private_jax.tpu_races_found()
    exact = np.asarray(jax.jit(reference)(*arguments), np.float64)
    assert np.all(y[0] == 0)  # no positions
    # a probability, a scaled query and the result are rounded to bfloat16; a score of
    # magnitude s changes its probability by s roundings
    scores = 4 * case.width**0.5
    most = 2.0**-9 * (scores / 4 + 2)
    assert np.linalg.norm(y - exact) <= most * np.linalg.norm(exact)
    assert np.abs(y - exact).max() <= 4 * most * np.abs(exact).max()


def test_what_does_not_count_does_not_matter():
    case = kernel.CASES[0]
    arguments, window = case.arrays(seed=1), 300
    run = functools.partial(
        kernel.decode_attention,
        window=window,
        tile=kernel.Tile(512),
        interpret=SIMULATED,
    )
    y = run(*arguments)
    ends, place = arguments[5][:, None, None], jnp.arange(case.positions)[None, None]
    outside = (place >= ends) | (place < ends - window)
    assert outside[-1].any()
    arguments[3] = jnp.where(outside, jnp.nan, arguments[3])
    arguments[4] = jnp.where(outside, jnp.nan, arguments[4])
    np.testing.assert_array_equal(run(*arguments), y)


@pytest.mark.parametrize(
    ("window", "visited"), [(None, 32), (4096, 5), (1024, 3), (100, 2), (1, 1)]
)
def test_a_window_visits_the_blocks_it_can_touch_and_no_others(window, visited):
    """Blocks of 1024 at most, and of half a window: the cache has 32768 positions."""
    shape = jax.ShapeDtypeStruct
    codes, scales = (
        shape((2, 8, 32768, *d), t) for d, t in (((128,), "int8"), ((), "f"))
    )
    q, ends = shape((2, 8, 128), jnp.bfloat16), shape((2,), jnp.int32)
    run = functools.partial(kernel.decode_attention, window=window)
    (call,) = (
        equation
        for equation in jax.make_jaxpr(run)(q, codes, codes, scales, scales, ends).eqns
        if equation.primitive.name == "pallas_call"
    )
    assert call.params["grid_mapping"].grid == (2, visited)


def test_heads_that_do_not_divide_are_refused():
    arguments = kernel.CASES[0].arrays()
    arguments[0] = arguments[0][:, :5]
    with pytest.raises(ValueError, match="5 heads, no multiple of the cache's 2"):
        kernel.decode_attention(*arguments)
