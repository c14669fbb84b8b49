"""Metrics against float64 NumPy, and the properties that define them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxq import metrics

LOGITS = arrays(
    np.float32, (3, 7), elements=st.floats(-30, 30, width=32, allow_subnormal=False)
)


def log_softmax64(logits):
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@given(LOGITS)
def test_negative_log_likelihood(logits):
    targets = np.array([0, 6, 3], np.int32)
    exact = -log_softmax64(logits)[np.arange(3), targets]
    got = metrics.negative_log_likelihood(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@given(LOGITS, LOGITS)
def test_kl_divergence(p, q):
    log_p, log_q = log_softmax64(p), log_softmax64(q)
    exact = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    got = metrics.kl_divergence(jnp.asarray(p), jnp.asarray(q))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_kl_divergence_has_a_direction():
    p, q = jnp.asarray([[0.0, 3.0]]), jnp.asarray([[1.0, 0.0]])
    there, back = metrics.kl_divergence(p, q), metrics.kl_divergence(q, p)
    assert abs(float(there[0]) - float(back[0])) > 0.1


def test_kl_divergence_of_a_token_that_is_ruled_out():
    p = jnp.asarray([[0.0, -jnp.inf]])
    q = jnp.asarray([[0.0, 0.0]])
    np.testing.assert_allclose(metrics.kl_divergence(p, q), [np.log(2)], rtol=1e-6)


def test_top1_agreement(rng):
    p, q = rng.normal(size=(2, 50, 11)).astype(np.float32)
    expected = p.argmax(-1) == q.argmax(-1)
    got = metrics.top1_agreement(jnp.asarray(p), jnp.asarray(q))
    np.testing.assert_array_equal(got, expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_and_noise_ratio(rng, dtype):
    x = jnp.asarray(rng.normal(size=(6, 5)), dtype)
    close = jnp.asarray(
        np.asarray(x, np.float64) + 0.1 * rng.normal(size=(6, 5)), dtype
    )
    wide, approximate = np.asarray(x, np.float64), np.asarray(close, np.float64)
    noise, signal = ((wide - approximate) ** 2).sum(), (wide**2).sum()
    exact = np.sqrt(noise / signal)
    np.testing.assert_allclose(metrics.relative_error(x, close), exact, rtol=1e-5)
    np.testing.assert_allclose(
        metrics.sqnr(x, close), 10 * np.log10(signal / noise), rtol=1e-5
    )


def test_no_error_is_zero_and_infinite():
    zero = jnp.zeros((2, 2))
    assert float(metrics.relative_error(zero, zero)) == 0
    assert float(metrics.sqnr(zero, zero)) == np.inf
