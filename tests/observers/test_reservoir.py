"""The sample: rows of the data, each as likely as any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.observers import reservoir
from tests.observers.small import see

ROWS, CAPACITY, DRAWS = 20, 5, 4000


def drawn(state):
    """The first feature of the rows in the sample."""
    return np.asarray(state.samples[:, 0])[np.asarray(state.valid)]


@functools.cache
def many_draws():
    """Which of the rows 0 … 19 were drawn, by thousands of keys: bool[draws, rows].

    The rows come in two batches, of 13 and 7 rows, whose samples are merged.
    """
    observer = reservoir(CAPACITY)
    rows = jnp.arange(float(ROWS))[:, None]

    def draw(key):
        state = observer.init(rows)._replace(key=key)
        a, b = (observer.update(state, x) for x in (rows[:13], rows[13:]))
        return observer.merge(a, b).samples[:, 0]

    keys = jax.random.bits(jax.random.key(7), (DRAWS, 2), jnp.uint32)
    found = np.asarray(jax.jit(jax.vmap(draw))(keys)).astype(int)
    return np.any(found[:, :, None] == np.arange(ROWS), axis=1)


def test_every_row_is_equally_likely():
    hits = many_draws()
    assert np.all(hits.sum(axis=1) == CAPACITY)
    # binomial with p = 1/4: five standard deviations, for 20 rows
    spread = 5 * np.sqrt(DRAWS * 0.25 * 0.75)
    assert np.max(np.abs(hits.sum(axis=0) - DRAWS / 4)) < spread


def test_every_pair_is_equally_likely():
    hits = many_draws().astype(int)
    pairs = (hits.T @ hits)[np.triu_indices(ROWS, 1)]
    share = 5 / 20 * 4 / 19
    spread = 5 * np.sqrt(DRAWS * share * (1 - share))
    assert np.max(np.abs(pairs - DRAWS * share)) < spread


def test_samples_are_whole_rows_without_repetition(rng):
    x = rng.standard_normal((4, 9, 3)).astype(np.float32)
    state = see(reservoir(capacity=6), *x)
    rows = {tuple(row) for row in x.reshape(-1, 3).tolist()}
    sample = {tuple(row) for row in np.asarray(state.samples).tolist()}
    assert len(sample) == 6
    assert sample <= rows
    assert state.largest == np.abs(x).max()


def test_fewer_rows_than_places_are_all_kept():
    x = np.arange(1, 6, dtype=np.float32)[:, None]
    state = see(reservoir(capacity=8), x[:2], x[2:])
    assert sorted(drawn(state)) == [1, 2, 3, 4, 5]
    assert state.valid.sum() == state.tokens == 5
    assert not np.any(state.samples[5:])


def test_the_seed_decides_alone():
    x = jnp.arange(100.0)[:, None]
    step = jax.jit(reservoir(8).update)
    first, again, other = (step(reservoir(8, s).init(x), x) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.samples, again.samples)
    assert set(drawn(first)) != set(drawn(other))


def test_batches_draw_independently_of_one_key():
    # Each is seen from the same empty state, as on several devices; they differ in one
    # value. Were places drawn alike, the samples would hold the same places.
    x = np.arange(1000, dtype=np.float32)[:, None]
    observer = reservoir(capacity=50)
    step = functools.partial(jax.jit(observer.update), observer.init(x))
    firsts = [np.concatenate([[[-v]], x[1:]], dtype=np.float32) for v in range(1, 9)]
    places = [set(drawn(step(y)) % 1000) for y in firsts]
    shared = [len(a & b) for i, a in enumerate(places) for b in places[:i]]
    # 28 pairs, 2.5 shared on average
    assert np.mean(shared) < 5
    merged = jax.jit(observer.merge)(step(x), step(x + 1000))
    assert 10 < np.sum(drawn(merged) >= 1000) < 40


def test_a_reservoir_without_places_is_refused():
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        reservoir(capacity=0)
