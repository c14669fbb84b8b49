"""The evaluation itself: windows in, sums out, one batch in memory at a time."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.metrics import kl_divergence, negative_log_likelihood, top1_agreement

Apply = Callable[[Any, jax.Array], jax.Array]
# (windows done, windows there are)
Progress = Callable[[int, int], None]

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model made of a text.

    Attributes:
        tokens: how many were predicted.
        nll: mean negative log likelihood per token, in nats.
        kl: mean ``KL(reference ‖ model)`` per token, in nats; None without a reference.
        top1: share of tokens where both find the same likeliest; None likewise.
        tokens_per_second: of the forward pass, the first (compiling) batch aside; NaN
            when there was only that one.
        seconds: all of it, compiling and scoring included.
    """

    tokens: int
    nll: float
    kl: float | None
    top1: float | None
    tokens_per_second: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``, infinite where that overflows."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def evaluate(
    apply: Apply,
    params: Any,
    windows: np.ndarray,
    reference: Iterable[jax.Array] | None = None,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model on windows of tokens.

    In each window every token but the first is predicted from those before it. Sums are
    taken in float32 per batch and in float64 over batches. Batches are padded to one
    shape, so ``apply`` compiles once.

    Args:
        apply: ``apply(params, tokens[B, T]) -> logits[B, T, V]``, compiled
            (`jaxq.quantized` and `jax.jit` are).
        params: its first argument, quantized or not.
        windows: ``int32[windows, tokens]``, see `cut_windows`.
        reference: another model's logits of the same batches, see `logits_of`. Consumed
            in step: a generator keeps one batch in memory, a list may be used again.
        batch: windows per batch; the same for the reference.
        progress: called after each batch.

    Raises:
        ValueError: when there are no windows, or the logits are not finite.
    """
    begin = time.perf_counter()
    rows = _check(windows, batch)
    others = iter(reference) if reference is not None else None
    totals = np.zeros(3)
    running, counted = 0.0, 0
    for start, tokens, real in _batches(windows, rows):
        clock = time.perf_counter()
        logits = jax.block_until_ready(apply(params, tokens))
        if start:
            running += time.perf_counter() - clock
            counted += tokens.size
        other = logits if others is None else next(others)
        totals += np.asarray(_score(other, logits, tokens, real), np.float64)
        if progress is not None:
            progress(min(start + rows, len(windows)), len(windows))
    tokens_seen = windows.shape[0] * (windows.shape[1] - 1)
    nll, kl, top1 = totals / tokens_seen
    if not math.isfinite(nll):
        raise ValueError(
            "the model's logits are not finite on this text, so it has no perplexity: "
            "look for NaN or Inf in its parameters, or use a wider dtype"
        )
    return Evaluation(
        tokens=tokens_seen,
        nll=float(nll),
        kl=None if others is None else max(float(kl), 0.0),
        top1=None if others is None else float(top1),
        tokens_per_second=counted / running if counted else math.nan,
        seconds=time.perf_counter() - begin,
    )


def logits_of(
    apply: Apply, params: Any, windows: np.ndarray, *, batch: int = BATCH
) -> Iterator[jax.Array]:
    """Yield a model's logits batch by batch, as `evaluate` takes for a reference."""
    rows = _check(windows, batch)
    for _, tokens, _ in _batches(windows, rows):
        yield apply(params, tokens)


@jax.jit
def _score(
    reference: jax.Array, logits: jax.Array, tokens: jax.Array, real: jax.Array
) -> jax.Array:
    """Return the sums of nll, KL and agreement over the real rows' predictions."""
    p, q, targets = reference[:, :-1], logits[:, :-1], tokens[:, 1:]
    per_token = jnp.stack(
        [
            negative_log_likelihood(q, targets),
            kl_divergence(p, q),
            top1_agreement(p, q).astype(jnp.float32),
        ]
    )
    return jnp.sum(jnp.where(real[:, None], per_token, jnp.float32(0)), axis=(1, 2))


def _batches(
    windows: np.ndarray, rows: int
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Yield (first window, tokens, which rows are real), all of one shape."""
    for start in range(0, len(windows), rows):
        part = windows[start : start + rows]
        real = np.arange(rows) < len(part)
        padded = np.resize(part, (rows, windows.shape[1]))
        yield start, jnp.asarray(padded), jnp.asarray(real)


def _check(windows: np.ndarray, batch: int) -> int:
    """Return the rows of a batch: as asked for, but not more than there are windows."""
    if windows.ndim != 2 or not len(windows):
        raise ValueError(
            f"windows has shape {windows.shape}; give int32[windows, tokens] with at "
            f"least one window"
        )
    if batch < 1:
        raise ValueError(f"batch is {batch}; give at least 1 window per batch")
    return min(batch, len(windows))
