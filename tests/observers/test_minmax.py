"""The laws of an observer, and what the range says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxq.observers import Observer, minmax

# One row per observer: the laws below hold for all of them.
OBSERVERS: dict[str, Observer] = {"minmax": minmax()}

LIKE = jax.ShapeDtypeStruct((4, 8), jnp.float32)
batches = st.lists(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.just(8)),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    min_size=3,
    max_size=4,
)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def seen(observer, *arrays):
    state = observer.init(LIKE)
    for x in arrays:
        state = observer.update(state, jnp.asarray(x))
    return state


@pytest.mark.parametrize("name", OBSERVERS)
@given(arrays=batches)
@settings(max_examples=15)
def test_merging_states_is_seeing_the_batches(name, arrays):
    observer = OBSERVERS[name]
    a, b, c = (seen(observer, x) for x in arrays[:3])
    same(observer.merge(a, b), observer.merge(b, a))
    same(
        observer.merge(observer.merge(a, b), c), observer.merge(a, observer.merge(b, c))
    )
    same(observer.merge(a, observer.init(LIKE)), a)
    same(observer.merge(observer.merge(a, b), c), seen(observer, *arrays[:3]))
    same(seen(observer, *arrays), seen(observer, *reversed(arrays)))


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_is_pure(name, rng):
    observer = OBSERVERS[name]
    x = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    state = seen(observer, x)
    same(jax.jit(observer.update)(observer.init(LIKE), x), state)
    abstract = jax.eval_shape(observer.update, observer.init(LIKE), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )
    assert jax.tree.structure(observer.init(LIKE)) == jax.tree.structure(state)


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_range_is_numpys(shape, dtype, rng):
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    state = seen(minmax(), x)
    wide = np.asarray(x, np.float32)
    assert (state.low, state.high) == (wide.min(), wide.max())
    assert state.absmax == np.abs(wide).max()
    assert state.tokens == (np.prod(shape[:-1], dtype=int) if shape else 1)
    assert {a.dtype for a in (state.low, state.high)} == {jnp.dtype("float32")}
    assert seen(minmax(), x, x, x).tokens == 3 * state.tokens


def test_the_largest_magnitude_may_be_negative():
    assert seen(minmax(), jnp.asarray([[-3.0, 1.0]])).absmax == 3.0


def test_infinity_and_nan_are_not_hidden():
    assert seen(minmax(), jnp.asarray([[1.0, jnp.inf]])).absmax == np.inf
    assert np.isnan(seen(minmax(), jnp.asarray([[1.0, jnp.nan]])).absmax)
