"""The extremes and their average, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxq.observers import absmax, channel_absmax, minmax, moving_average
from jaxq.spec import QuantSpec
from tests.observers.small import find, see

INT8 = QuantSpec("int8", "tensor")


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_range_is_numpys(shape, dtype, rng):
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    state = see(minmax(), x)
    wide = np.asarray(x, np.float32)
    assert (state.low, state.high) == (wide.min(), wide.max())
    assert state.absmax == np.abs(wide).max()
    assert state.tokens == (np.prod(shape[:-1], dtype=int) if shape else 1)
    assert {a.dtype for a in (state.low, state.high)} == {jnp.dtype("float32")}
    assert see(minmax(), x, x, x).tokens == 3 * state.tokens


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-1024, 1024, width=32)),
    hnp.arrays(np.bool_, (3,)),
)
@settings(max_examples=25)
def test_only_rows_of_the_mask_count(x, mask):
    kept = x[mask]
    for observer in (absmax(), minmax(), channel_absmax()):
        state = observer.update(observer.init(x), x, mask)
        assert state.tokens == mask.sum()
        if hasattr(state, "low"):
            assert state.low == kept.min(initial=np.inf)
            assert state.high == kept.max(initial=-np.inf)
        else:
            axis = 0 if state.largest.ndim else None
            expected = np.abs(kept).max(axis=axis, initial=0)
            np.testing.assert_array_equal(state.largest, expected)


def test_the_largest_magnitude_may_be_negative():
    x = jnp.asarray([[-3.0, 1.0]])
    assert see(minmax(), x).absmax == see(absmax(), x).largest == 3.0
    assert find(minmax(), see(minmax(), x), INT8) == (-3.0, 1.0)
    assert find(absmax(), see(absmax(), x), INT8) == (-3.0, 3.0)


def test_infinity_and_nan_are_not_hidden():
    assert see(minmax(), jnp.asarray([[1.0, jnp.inf]])).absmax == np.inf
    assert np.isnan(see(minmax(), jnp.asarray([[1.0, jnp.nan]])).absmax)


def test_the_average_forgets_as_its_momentum_says(rng):
    xs = rng.standard_normal((4, 5, 3)).astype(np.float32)
    low, high = xs[0].min(), xs[0].max()
    for x in xs[1:]:
        low, high = 0.8 * low + 0.2 * x.min(), 0.8 * high + 0.2 * x.max()
    state = see(moving_average(momentum=0.8), *xs)
    np.testing.assert_allclose((state.low, state.high), (low, high), rtol=1e-6)
    assert see(moving_average(momentum=0), *xs).high == xs[-1].max()


def test_averages_merge_by_tokens():
    observer = moving_average()
    a = see(observer, jnp.full((3, 2), 4.0))
    b = see(observer, jnp.full((1, 2), -8.0))
    merged = observer.merge(a, b)
    assert (merged.low, merged.high, merged.tokens) == (1.0, 1.0, 4)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2])
def test_a_momentum_that_never_forgets_is_refused(momentum):
    with pytest.raises(ValueError, match=rf"momentum={momentum} must lie in \[0, 1\)"):
        moving_average(momentum)


def test_a_row_of_one_feature_may_be_a_scalar():
    state = channel_absmax().init(jax.ShapeDtypeStruct((), jnp.float32))
    assert channel_absmax().update(state, jnp.float32(-2)).largest.tolist() == [2.0]
