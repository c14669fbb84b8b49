"""A weight as a matrix: rows, groups, blocks and scales, element by element."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.solvers.matrix import MatrixView
from jaxq.spec import QuantSpec
from tests import oracle
from tests.solvers.layers import nearest_codes

CASES = [
    ((20, 6), (0,), QuantSpec("int4", 8)),  # a ragged last group
    ((20, 6), (1,), QuantSpec("int4", 4)),
    ((4, 6, 5), (0, 1), QuantSpec("int4", 12)),  # groups over two axes
    ((4, 5, 6), (0, 2), QuantSpec("int4", 4)),  # ragged in every row of heads
    ((3, 50, 2), (1,), QuantSpec("int4", 50)),  # a group of no whole bytes
    ((12, 4, 7), (0,), QuantSpec("int8", (5, 3))),  # tiles, ragged both ways
    ((6, 4, 5), (0, 1), QuantSpec("int8", "tensor")),
    ((6, 4, 5), (1,), QuantSpec("int8", "channel")),
    ((9,), (0,), QuantSpec("int8", 4)),  # a vector: no free axis
]
ids = [f"{shape}-{axis}-{spec.describe()}" for shape, axis, spec in CASES]


@pytest.mark.parametrize(("shape", "axis", "spec"), CASES, ids=ids)
def test_rows_groups_and_columns(shape, axis, spec):
    view = MatrixView.of(shape, spec, axis)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    free = [a for a in range(len(shape)) if a not in axis]
    matrix = np.asarray(view.to_matrix(x))
    for place in itertools.product(*map(range, shape)):
        row = np.ravel_multi_index([place[a] for a in axis], view.contracted)
        column = np.ravel_multi_index([place[a] for a in free], view.free or (1,)) \
            if free else 0  # fmt: skip
        assert matrix[row, column] == x[place]
    np.testing.assert_array_equal(view.from_matrix(matrix), x)


@pytest.mark.parametrize(("shape", "axis", "spec"), CASES, ids=ids)
def test_scales_meet_the_elements_that_a_tensor_gives_them(shape, axis, spec):
    view = MatrixView.of(shape, spec, axis)
    q = nearest_codes(jnp.ones(shape), spec, axis)
    scales = np.arange(1.0, q.scales.size + 1, dtype=np.float32).reshape(q.scales.shape)
    spread = oracle.spread(scales, q.block, shape)
    groups = jax.jit(view.grid_to_groups)(scales)
    assert groups.shape == (len(view.slots), view.columns)
    by_rows = np.asarray(groups)[view.row_groups]
    np.testing.assert_array_equal(view.from_matrix(by_rows), spread)
    np.testing.assert_array_equal(jax.jit(view.columns_to_grid)(groups), scales)


@pytest.mark.parametrize(("shape", "axis", "spec"), CASES, ids=ids)
def test_groups_hold_their_rows_and_zeros(shape, axis, spec, rng):
    view = MatrixView.of(shape, spec, axis)
    x = rng.standard_normal((view.rows, 2)).astype(np.float32)
    gram = x @ x.T
    groups = np.asarray(jax.jit(view.to_groups)(x))
    blocks = np.asarray(jax.jit(view.gram_blocks)(gram))
    for g in range(len(view.slots)):
        mine = np.flatnonzero(view.row_groups == g)
        assert np.all(np.diff(mine) == 1)
        np.testing.assert_array_equal(groups[g, : len(mine)], x[mine])
        assert not groups[g, len(mine) :].any()
        n = len(mine)
        np.testing.assert_array_equal(blocks[g, :n, :n], gram[np.ix_(mine, mine)])
        assert not blocks[g, n:].any()
        assert not blocks[g, :, n:].any()


def test_columns_of_a_block_are_summed():
    view = MatrixView.of((12, 4, 7), QuantSpec("int8", (5, 3)), 0)
    x = np.arange(28.0, dtype=np.float32)
    expected = x.reshape(4, 7).copy()
    for columns in (slice(0, 3), slice(3, 6), slice(6, 7)):
        expected[:, columns] = expected[:, columns].sum(1, keepdims=True)
    got = view.sum_columns(jnp.asarray(x))
    np.testing.assert_array_equal(got, expected.reshape(-1))
