"""Measures of what quantization cost: pure functions of arrays, all in float32."""

import jax
import jax.numpy as jnp


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return ``−log softmax(logits)[target]`` of every token, in nats.

    Args:
        logits: ``[..., vocab]``.
        targets: ``int[...]``, the token that came.

    Returns:
        ``float32[...]``. The perplexity is ``exp`` of its mean.

    Example:
        >>> uniform = jnp.zeros((1, 4))
        >>> float(jnp.exp(negative_log_likelihood(uniform, jnp.asarray([2])))[0])
        4.0
    """
    wide = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(wide, axis=-1) - picked


def kl_divergence(reference: jax.Array, other: jax.Array) -> jax.Array:
    """Return ``KL(p ‖ q) = Σ p (log p − log q)`` of every token, in nats.

    Args:
        reference: logits ``[..., vocab]`` of p, the float model.
        other: logits of q, the quantized one.

    Returns:
        ``float32[...]``, 0 where both predict the same.

    Example:
        >>> logits = jnp.asarray([[0.0, 1.0, 2.0]])
        >>> kl_divergence(logits, logits + 5.0).tolist()
        [0.0]
    """
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(other.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    # A token that p rules out adds nothing, whatever q says: 0 · (−inf − x) is no NaN.
    terms = jnp.where(p > 0, p * (log_p - log_q), jnp.float32(0))
    return jnp.sum(terms, axis=-1)


def top1_agreement(reference: jax.Array, other: jax.Array) -> jax.Array:
    """Return for every token whether both find the same token likeliest.

    Args:
        reference: logits ``[..., vocab]``.
        other: logits of the same shape.

    Returns:
        ``bool[...]``; its mean is the agreement.
    """
    return jnp.argmax(reference, axis=-1) == jnp.argmax(other, axis=-1)


def relative_error(x: jax.Array, approximation: jax.Array) -> jax.Array:
    """Return ``‖x − x̂‖ / ‖x‖`` over all elements, 0 when both are zero everywhere.

    Example:
        >>> float(relative_error(jnp.asarray([3.0, 4.0]), jnp.asarray([3.0, 3.0])))
        0.20000000298023224
    """
    exact, close = x.astype(jnp.float32), approximation.astype(jnp.float32)
    size, error = (
        jnp.linalg.norm(exact.ravel()),
        jnp.linalg.norm((exact - close).ravel()),
    )
    return jnp.where(error == 0, jnp.float32(0), error / size)


def sqnr(x: jax.Array, approximation: jax.Array) -> jax.Array:
    """Return the signal to quantization noise ratio, in decibels.

    ``10 log10(Σ x² / Σ (x − x̂)²)``; infinite where nothing was lost. Six decibels are
    about one bit.
    """
    return -20 * jnp.log10(relative_error(x, approximation))
