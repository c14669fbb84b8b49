"""The streamed evaluation against one float64 pass over everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.evaluate import evaluate, logits_of

VOCAB, WIDTH = 13, 6


@pytest.fixture(scope="module")
def model():
    """A bigram model: the logits depend on the current token alone."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(VOCAB, VOCAB)) * 2, jnp.float32)
    return jax.jit(lambda params, tokens: params[tokens]), table


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(2)
    return rng.integers(0, VOCAB, (11, WIDTH)).astype(np.int32)


def exact(table, windows, other):
    """Mean nll, KL(table || other) and agreement, in float64."""

    def log_softmax(logits):
        wide = np.asarray(logits, np.float64)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    current, following = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    log_p, log_q = log_softmax(table)[current], log_softmax(other)[current]
    nll = -log_q[np.arange(len(following)), following].mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    return nll, kl, (log_p.argmax(-1) == log_q.argmax(-1)).mean()


@pytest.mark.parametrize("batch", [1, 4, 11, 64])
def test_matches_float64(model, windows, batch, rng):
    apply, table = model
    other = table + jnp.asarray(rng.normal(size=table.shape), jnp.float32)
    stream = logits_of(apply, table, windows, batch=batch)
    found = evaluate(apply, other, windows, stream, batch=batch)
    nll, kl, top1 = exact(table, windows, other)
    assert found.tokens == 11 * (WIDTH - 1)
    np.testing.assert_allclose(
        [found.nll, found.kl, found.top1], [nll, kl, top1], rtol=1e-5
    )
    np.testing.assert_allclose(found.perplexity, np.exp(nll), rtol=1e-5)


def test_without_a_reference(model, windows):
    apply, table = model
    found = evaluate(apply, table, windows)
    assert found.kl is None
    assert found.top1 is None
    np.testing.assert_allclose(found.nll, exact(table, windows, table)[0], rtol=1e-5)


def test_against_itself(model, windows):
    apply, table = model
    kept = list(logits_of(apply, table, windows))
    for _ in range(2):  # a list serves again
        found = evaluate(apply, table, windows, kept)
        assert (found.kl, found.top1) == (0, 1)


def test_compiles_once_and_reports_progress(windows):
    traces, seen = [], []

    @jax.jit
    def apply(params, tokens):
        traces.append(tokens.shape)
        return params[tokens]

    params = jnp.eye(VOCAB)
    evaluate(
        apply, params, windows, batch=4, progress=lambda *counts: seen.append(counts)
    )
    assert traces == [(4, WIDTH)]
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_speed_leaves_the_compiling_batch_out(model, windows):
    apply, table = model
    assert evaluate(apply, table, windows, batch=4).tokens_per_second > 0
    assert np.isnan(evaluate(apply, table, windows, batch=11).tokens_per_second)


def test_hopeless_logits_are_an_infinite_perplexity(windows):
    apply = jax.jit(lambda p, t: jnp.where(jnp.arange(VOCAB) == 0, 1e5, p[t]))
    found = evaluate(apply, jnp.zeros((VOCAB, VOCAB)), windows)
    assert found.perplexity == np.inf


def test_refuses_logits_that_are_not_finite(model, windows):
    apply, table = model
    with pytest.raises(ValueError, match=r"not finite.*NaN or Inf in its parameters"):
        evaluate(apply, table.at[3, 3].set(jnp.nan), windows)


@pytest.mark.parametrize("shape", [(0, 8), (8,)])
def test_refuses_windows_of_another_shape(model, shape):
    with pytest.raises(ValueError, match="windows has shape"):
        evaluate(*model, np.zeros(shape, np.int32))


def test_refuses_an_empty_batch(model, windows):
    with pytest.raises(ValueError, match="batch is 0"):
        evaluate(*model, windows, batch=0)
