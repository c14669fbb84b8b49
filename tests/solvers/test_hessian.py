"""The factor of the damped Hessian, and what happens when there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.solvers.hessian import curvature, factor
from jaxq.solvers.matrix import MatrixView
from jaxq.solvers.order import ORDERS, by_slots
from jaxq.spec import QuantSpec
from tests.solvers.layers import damped, inputs

K = 20
VIEW = MatrixView.of((K, 3), QuantSpec("int4", 8), 0)  # groups of 8, 8 and 4


@functools.partial(jax.jit, static_argnames=("name", "block", "damping"))
def run(gram, name="activation", block=1, damping=0.05):
    of = curvature(gram)
    order = ORDERS[name](VIEW, of.diagonal, block)
    places = jnp.arange(order.length) if order.places is None else order.places
    return factor(gram, of, order, damping), places


@pytest.fixture
def gram(rng):
    x = inputs(rng, 100, K).astype(np.float64)
    return x.T @ x


@pytest.mark.parametrize("name", ORDERS)
def test_it_is_the_factor_in_the_order_of_rounding(name, gram):
    f, places = run(jnp.asarray(gram, jnp.float32), name)
    places = np.asarray(places)
    h = damped(gram, 0.05)[np.ix_(places, places)] / np.mean(np.diag(gram))
    m = np.asarray(f.lower, np.float64)
    np.testing.assert_array_equal(m, np.tril(m))
    np.testing.assert_allclose(m.T @ m, h, atol=2e-6)
    # GPTQ's own factor is the inverse of it, transposed
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    np.testing.assert_allclose(np.linalg.inv(m).T, u, rtol=1e-3, atol=1e-4)
    assert bool(f.ok)
    assert (int(f.tries), float(f.damping)) == (1, pytest.approx(0.05))


def test_places_that_fill_a_block_have_no_part(gram):
    f, places = run(jnp.asarray(gram, jnp.float32), block=8)
    whole, _ = run(jnp.asarray(gram, jnp.float32))
    assert np.asarray(places)[K:].tolist() == [K] * 4
    np.testing.assert_allclose(f.lower[:K, :K], whole.lower, atol=1e-6)
    assert np.all(np.asarray(f.lower)[K:, :K] == 0)


def indefinite(by):
    """Ones on the diagonal, and a smallest eigenvalue of ``−by``."""
    c = (1 + by) / (K - 1)
    return jnp.asarray((1 + c) * np.eye(K) - c * np.ones((K, K)), jnp.float32)


@pytest.mark.parametrize(
    ("by", "first", "tries", "damping"),
    [
        (0.03, 0.0, 4, 0.1),  # 0, .001, .01, .1
        (0.03, 0.05, 1, 0.05),
        (0.03, 0.01, 2, 0.1),
        (0.6, 0.05, 3, 1.0),  # .05, .5, 1
        (0.6, 0.3, 2, 1.0),
    ],
)
def test_damping_grows_tenfold_until_there_is_a_factor(by, first, tries, damping):
    f, _ = run(indefinite(by), damping=first)
    assert (int(f.tries), float(f.damping)) == (tries, pytest.approx(damping))
    assert bool(f.ok)


def test_what_cannot_be_factored_gives_the_identity():
    f, _ = run(indefinite(1.5))
    assert not bool(f.ok)
    assert (int(f.tries), float(f.damping)) == (3, 1.0)
    np.testing.assert_array_equal(f.lower, np.eye(K))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_tried(wrong, gram):
    gram[3, 7] = gram[7, 3] = wrong
    f, _ = run(jnp.asarray(gram, jnp.float32))
    assert not bool(f.ok)
    assert int(f.tries) == 0
    np.testing.assert_array_equal(f.lower, np.eye(K))


def test_dead_rows_have_no_part(gram):
    dead = [2, 11]
    gram[dead] = gram[:, dead] = 0
    f, places = run(jnp.asarray(gram, jnp.float32))
    at = [np.asarray(places).tolist().index(row) for row in dead]
    m = np.asarray(f.lower)
    off = m - np.diag(np.diag(m))
    assert np.all(off[at] == 0)
    assert np.all(off[:, at] == 0)
    # and the unit is the mean over the living
    of = curvature(jnp.asarray(gram, jnp.float32))
    assert float(of.unit) == pytest.approx(np.trace(gram) / (K - 2), rel=1e-5)


def test_nothing_seen_is_not_usable():
    of = curvature(jnp.zeros((K, K), jnp.float32))
    assert not bool(of.usable)
    assert float(of.unit) == 1


# ------------------------------------------------------------------------------ order


def test_the_order_of_activations_is_descending_and_stable():
    diagonal = jnp.asarray([1.0, 5.0, 5.0, 0.0] * 5)
    order = ORDERS["activation"](VIEW, diagonal, 8)
    expected = np.argsort(-np.asarray(diagonal), kind="stable").tolist()
    assert np.asarray(order.places).tolist() == [*expected, *[K] * 4]
    np.testing.assert_array_equal(order.groups[:K], VIEW.row_groups[expected])


def test_the_order_of_groups_keeps_them_together(rng):
    diagonal = jnp.asarray(rng.permutation(K), jnp.float32)
    order = ORDERS["group"](VIEW, diagonal, 1)
    rows = np.split(np.arange(K), [8, 16])
    rows = sorted(rows, key=lambda r: -np.asarray(diagonal)[r].max())
    rows = [r[np.argsort(-np.asarray(diagonal)[r])] for r in rows]
    np.testing.assert_array_equal(order.places, np.concatenate(rows))


@pytest.mark.parametrize("name", ["natural", "group"])
def test_every_group_begins_at_a_multiple_of_one_size(name, rng):
    diagonal = jnp.asarray(rng.permutation(K), jnp.float32)
    order = by_slots(ORDERS[name](VIEW, diagonal, 1), VIEW, 16)
    assert order.length == 32
    groups = np.asarray(order.groups).reshape(-1, 8)
    assert np.all(groups == groups[:, :1])
    assert sorted(groups[:, 0]) == [0, 1, 2, 3]
    x = jnp.arange(K * 2.0).reshape(K, 2) + 1
    taken = np.asarray(order.take(x)).reshape(-1, 8, 2)
    for group, rows in zip(groups[:, 0], taken, strict=True):
        held = {int(v - 1) // 2 for v in rows[:, 0] if v}
        assert held == set(np.flatnonzero(VIEW.row_groups == group))
    np.testing.assert_array_equal(order.back(order.take(x)), x)
