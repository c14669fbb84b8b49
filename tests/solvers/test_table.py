"""What every solver of the table must do, whatever its method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.solvers import SOLVERS, solve
from jaxq.spec import QuantSpec

SPEC = QuantSpec("uint4", 32, False, scale="bfloat16")

# Options under which a solver of the table is tested; none when it has no row here.
OPTIONS = {"rtn": (("clip", "mse"), ("steps", 7))}


def call(weight, name, contracting=(0,), stacked=(), spec=SPEC):
    options = OPTIONS.get(name, ())
    return solve(
        weight,
        spec=spec,
        solver=name,
        options=options,
        contracting=contracting,
        stacked=stacked,
    )


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.standard_normal((2, 64, 6)), jnp.float32)


@pytest.mark.parametrize("name", SOLVERS)
def test_compiled_equals_eager(name, weight):
    eager = SOLVERS[name](weight[0], None, SPEC, axis=(0,), **dict(OPTIONS[name]))
    compiled = call(weight[0], name)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    jax.tree.map(np.testing.assert_array_equal, eager, compiled)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_abstract_result_is_the_result(name, weight):
    got = call(weight[0], name)
    abstract = jax.eval_shape(lambda w: call(w, name), weight[0])
    assert jax.tree.structure(abstract) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(got), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert (got.shape, got.dtype) == (weight[0].shape, weight.dtype)


@pytest.mark.parametrize("name", SOLVERS)
def test_stacked_weights_are_solved_each_for_itself(name, weight):
    stack = call(weight, name, contracting=(1,), stacked=(0,))
    for i in range(2):
        alone = call(weight[i], name)
        # as leaves: the stack's blocks count an axis more
        for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_shape_is_compiled_once(name, weight):
    call(weight[0], name)
    before = solve._cache_size()
    call(weight[1], name)
    jax.eval_shape(lambda w: call(w, name), weight[1])
    assert solve._cache_size() == before


@pytest.mark.parametrize("name", SOLVERS)
def test_arithmetic_is_float32_whatever_the_dtype(name, weight):
    narrow = weight[0].astype(jnp.bfloat16)
    got = call(narrow, name)
    assert got.dtype == jnp.bfloat16
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(got),
        jax.tree.leaves(call(narrow.astype(jnp.float32), name)),
    )
