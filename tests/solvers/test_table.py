"""What every solver of the table must do, whatever its method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.solvers import SOLVERS, solve_with
from jaxq.spec import QuantSpec
from tests.solvers.layers import inputs, statistics

SPEC = QuantSpec("uint4", 32, False, scale="bfloat16")
K, N = 64, 6

# Options under which a solver of the table is tested; none when it has no row here.
OPTIONS = {
    "rtn": (("clip", "mse"), ("steps", 7)),
    "gptq": (("block_size", 16), ("steps", 7)),
}


def call(weight, seen, name, contracting=(0,), stacked=()):
    return solve_with(
        weight,
        seen if SOLVERS[name].needs else None,
        spec=SPEC,
        solver=name,
        options=OPTIONS.get(name, ()),
        contracting=contracting,
        stacked=stacked,
    )


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.standard_normal((2, K, N)), jnp.float32)


@pytest.fixture
def seen(rng):
    return statistics(np.stack([inputs(rng, 128, K) for _ in range(2)]))


def part(seen, i):
    return jax.tree.map(lambda x: x[i], seen)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_row_is_named_as_it_is_found(name):
    row = SOLVERS[name]
    assert row.name == name
    assert set(row.needs) <= {"gram", "tokens", "drift", "magnitude", "absmax"}


@pytest.mark.parametrize("name", SOLVERS)
def test_compiled_equals_eager(name, weight, seen):
    options, needs = dict(OPTIONS.get(name, ())), SOLVERS[name].needs
    given = part(seen, 0) if needs else None
    eager = SOLVERS[name].run(weight[0], given, SPEC, axis=(0,), **options)
    same(eager, call(weight[0], part(seen, 0), name))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_abstract_result_is_the_result(name, weight, seen):
    got = call(weight[0], part(seen, 0), name)
    abstract = jax.eval_shape(lambda w, s: call(w, s, name), weight[0], part(seen, 0))
    assert jax.tree.structure(abstract) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(got), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert (got.weight.shape, got.weight.dtype) == (weight[0].shape, weight.dtype)


@pytest.mark.parametrize("name", SOLVERS)
def test_stacked_weights_are_solved_each_for_itself(name, weight, seen):
    stack = call(weight, seen, name, contracting=(1,), stacked=(0,))
    for i in range(2):
        alone = call(weight[i], part(seen, i), name)
        # as leaves: the stack's blocks count an axis more
        for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_shape_is_compiled_once(name, weight, seen):
    call(weight[0], part(seen, 0), name)
    before = solve_with._cache_size()
    call(weight[1], part(seen, 1), name)
    jax.eval_shape(lambda w: call(w, part(seen, 1), name), weight[1])
    assert solve_with._cache_size() == before


@pytest.mark.parametrize("name", SOLVERS)
def test_arithmetic_is_float32_whatever_the_dtype(name, weight, seen):
    narrow = weight[0].astype(jnp.bfloat16)
    got = call(narrow, part(seen, 0), name)
    assert got.weight.dtype == jnp.bfloat16
    wide = call(narrow.astype(jnp.float32), part(seen, 0), name)
    same(jax.tree.leaves(got), jax.tree.leaves(wide))
