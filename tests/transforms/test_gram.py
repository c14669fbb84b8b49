"""The Gram matrix of a changed activation, and the check that products agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.transforms import expand_gram, function_preserved, scale_gram


@pytest.mark.parametrize("stack", [(), (3,)])
def test_gram_of_the_changed_activation(stack, rng):
    x = rng.standard_normal((*stack, 20, 6))
    s = rng.uniform(0.1, 10, (*stack, 6))
    index = np.asarray([0, 1, 2, 3, 4, 5, 2, 2])

    def gram(x):
        return np.swapaxes(x, -1, -2) @ x

    whole = jnp.asarray(gram(x), jnp.float32)
    got = scale_gram(whole, jnp.asarray(s, jnp.float32))
    np.testing.assert_allclose(got, gram(x / s[..., None, :]), rtol=1e-4, atol=1e-4)
    got = expand_gram(whole, jnp.asarray(index))
    np.testing.assert_allclose(got, gram(x[..., index]), rtol=1e-5, atol=1e-5)


def test_an_index_for_each_of_a_stack(rng):
    gram = rng.standard_normal((2, 3, 3)).astype(np.float32)
    index = np.asarray([[0, 1, 2, 0], [0, 1, 2, 2]])
    got = expand_gram(jnp.asarray(gram), jnp.asarray(index))
    for one, i, g in zip(got, index, gram, strict=True):
        np.testing.assert_array_equal(one, g[np.ix_(i, i)])


def test_what_changed_the_function_is_noticed(rng):
    w = jnp.asarray(rng.standard_normal((2, 6, 4)), jnp.float32)
    s = jnp.asarray(rng.uniform(0.1, 10, (2, 6)), jnp.float32)
    index = jnp.asarray([0, 1, 2, 3, 4, 5, 1])
    half = jnp.ones(7, jnp.float32).at[jnp.asarray([1, 6])].set(0.5)
    rows = (w * s[..., None])[:, index] * half[:, None]
    preserved = jax.jit(function_preserved)
    same = preserved(w, rows, scale=s, index=index)
    np.testing.assert_array_equal(same, [True, True])
    broken = rows.at[1, 2, 0].multiply(1.001)
    same = preserved(w, broken, scale=s, index=index)
    np.testing.assert_array_equal(same, [True, False])
    swapped = index.at[6].set(2)
    assert not preserved(w, rows, scale=s, index=swapped).any()
