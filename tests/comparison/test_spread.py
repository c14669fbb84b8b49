"""Means, spreads and verdicts against sums by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.comparison.spread import Losses, Measured, measured, verdicts

POSITIVE = st.floats(1e-6, 10.0)


@given(st.lists(POSITIVE, min_size=2, max_size=6))
def test_the_spread_is_the_sample_standard_deviation(values):
    found = measured(values, drawn=True)
    mean = sum(values) / len(values)
    squares = sum((v - mean) ** 2 for v in values)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    expected = math.sqrt(squares / (len(values) - 1))
    np.testing.assert_allclose(found.spread, expected, rtol=1e-9, atol=1e-12)


def test_one_draw_has_no_spread_and_no_draw_has_none_to_have():
    assert measured([0.3], drawn=True) == Measured(0.3, None)
    assert measured([0.3], drawn=False) == Measured(0.3, 0.0)


def test_what_is_not_finite_stays_so():
    assert measured([1.0, math.inf], drawn=True) == Measured(math.inf, None)


def judge(*recipes):
    """Verdicts of (name, bits, values), drawn when there are several values."""
    found = [Losses(n, bits, tuple(v), len(v) > 1) for n, bits, v in recipes]
    return verdicts(found)


def test_a_recipe_is_held_against_the_best_that_is_not_larger():
    eight, four, worse, two = judge(
        ("eight", 8.1, [0.001]),
        ("four", 4.7, [0.01]),
        ("worse", 4.8, [0.03]),
        ("two", 2.9, [0.2]),
    )
    assert [v.best for v in (eight, four, worse, two)] == [True, True, False, True]
    assert (worse.against, worse.noise) == ("four", False)
    np.testing.assert_allclose(worse.ratio, 3.0)


def test_a_few_bytes_more_are_the_same_size():
    plain, ordered = judge(("plain", 4.75, [0.03]), ("ordered", 4.90, [0.01]))
    assert plain.against == "ordered"
    assert judge(("plain", 4.75, [0.03]), ("bigger", 5.1, [0.01]))[0].best
    assert ordered.best


def test_draws_are_compared_in_pairs():
    """Draws move both recipes alike, and one of them is ahead in every draw."""
    ahead, behind = judge(
        ("ahead", 4.0, [0.10, 0.20, 0.30]), ("behind", 4.0, [0.11, 0.21, 0.32])
    )
    assert ahead.best
    assert behind.noise is False
    np.testing.assert_allclose(behind.ratio, 0.64 / 0.60)


def test_a_difference_within_its_spread_is_noise():
    """Differences −1, 4, 0: mean 1, standard deviation 2.65."""
    _, mixed = judge(("best", 4.0, [1.0, 2.0, 3.0]), ("mixed", 4.0, [0.0, 6.0, 3.0]))
    assert mixed.noise
    _, clear = judge(("best", 4.0, [1.0, 2.0, 3.0]), ("clear", 4.0, [4.0, 6.0, 6.0]))
    assert clear.noise is False


def test_data_free_recipes_are_compared_with_every_draw():
    """Differences 1, −1, 1.5: mean 0.5, standard deviation 1.32."""
    fixed, drawn = judge(("fixed", 4.0, [2.0]), ("drawn", 4.0, [3.0, 1.0, 3.5]))
    assert fixed.best
    assert drawn.noise


def test_one_draw_cannot_tell():
    found = [Losses("a", 4.0, (0.1,), drawn=True), Losses("b", 4.0, (0.2,), drawn=True)]
    assert verdicts(found)[1].noise is None


def test_no_loss_at_all():
    same, other = judge(("same", 8.0, [0.0]), ("other", 8.0, [0.1]))
    assert same.best
    assert other.ratio == math.inf
    infinite = judge(("fine", 4.0, [0.1, 0.1]), ("broken", 4.0, [0.1, math.inf]))[1]
    assert infinite.noise is False


@given(st.lists(st.tuples(st.floats(1, 9), POSITIVE), min_size=1, max_size=8))
def test_best_is_what_nothing_beats_at_its_size(points):
    found = judge(*((str(i), bits, [kl]) for i, (bits, kl) in enumerate(points)))
    for (bits, kl), verdict in zip(points, found, strict=True):
        beaten = any(b <= 1.05 * bits and other < kl for b, other in points)
        assert verdict.best == (not beaten)
        assert verdict.ratio >= 1


@pytest.mark.parametrize("seeds", [2, 5])
def test_noise_is_rarely_called_a_difference(seeds):
    """Of recipes that differ by chance alone, most are told to."""
    rng = np.random.default_rng(0)
    noise = 0
    for _ in range(400):
        a, b = rng.normal(1.0, 0.1, (2, seeds))
        worse = max(judge(("a", 4.0, a), ("b", 4.0, b)), key=lambda v: v.ratio)
        noise += bool(worse.noise)
    # |mean| < s is |t| < √n: t with n − 1 degrees has 61 % (n=2), 91 % (n=5) there;
    # the standard deviation of the count is below 10
    expected = {2: 0.608, 5: 0.911}[seeds] * 400
    assert abs(noise - expected) < 40
