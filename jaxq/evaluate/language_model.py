"""The evaluation of a language model on a text: the protocol behind the numbers."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jaxq.evaluate.evaluation import (
    BATCH,
    Evaluation,
    Progress,
    evaluate,
    logits_of,
)
from jaxq.evaluate.windows import cut_windows

LONGEST_WINDOW = 2048  # what published perplexities are measured with
LOGIT_BYTES = 64 * 2**20  # the largest thing held: float32[batch, tokens, vocab]


class LanguageModel(Protocol):
    """What an evaluation needs of a model; `jaxq.LM` is one."""

    @property
    def params(self) -> Any:
        """The parameters, float or quantized."""

    @property
    def config(self) -> Any:
        """Its shape; ``context`` and ``vocab_size`` are read."""

    @property
    def apply(self) -> Callable[..., jax.Array]:
        """``apply(params, tokens[B, T]) -> logits[B, T, V]``."""

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text."""


def text_windows(
    lm: LanguageModel, text: str, window: int | None = None, limit: int | None = None
) -> np.ndarray:
    """Encode a text and cut it into the windows that perplexity is measured on.

    Args:
        lm: whose tokenizer and context are used.
        text: encoded whole, so special tokens are added where the tokenizer adds them
            (for Llama one BOS, at the beginning of the text and nowhere else).
        window: tokens per window; None is the model's context, at most 2048.
        limit: at most so many windows; None takes all.

    Raises:
        ValueError: when the text has fewer than 2 tokens, or the window does not fit
            the context.
    """
    if not hasattr(lm, "stream"):
        raise ValueError(
            f"perplexity needs a causal language model, and this is a "
            f"{type(lm).__name__}: it predicts no next token"
        )
    context = int(lm.config.context)
    length = min(context, LONGEST_WINDOW) if window is None else window
    if length > context:
        raise ValueError(
            f"window is {length} tokens, more than the model's context of {context}: "
            f"give {context} or fewer"
        )
    return cut_windows(lm.encode(text), length, limit)


def evaluate_text(
    lm: LanguageModel,
    text: str,
    reference: LanguageModel | None = None,
    *,
    window: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on a text, and how far it is from a reference.

    The protocol: the text is one stream of tokens, cut into windows that do not
    overlap; in each, every token but the first is predicted; the mean negative log
    likelihood is taken over all predicted tokens in float32; a rest shorter than a
    window is dropped.

    Args:
        lm: the model.
        text: any text with at least 2 tokens.
        reference: the float model, for the divergence ``KL(reference ‖ lm)`` and the
            top-1 agreement. Must have the same tokens.
        window: tokens per window; None is the model's context, at most 2048.
        limit: at most so many windows; None takes all.
        progress: called as (windows done, windows there are).

    Raises:
        ValueError: when the text is too short, the window too long, or the reference
            has other tokens.
    """
    windows = text_windows(lm, text, window, limit)
    batch = batch_size(int(lm.config.vocab_size), windows.shape[1])
    stream = None
    if reference is not None:
        _check_same_tokens(lm, reference, text)
        stream = logits_of(reference.apply, reference.params, windows, batch=batch)
    return evaluate(
        lm.apply, lm.params, windows, stream, batch=batch, progress=progress
    )


def batch_size(vocab: int, window: int) -> int:
    """Return how many windows of ``window`` tokens go into a batch."""
    return min(max(LOGIT_BYTES // (4 * vocab * window), 1), BATCH)


def perplexity(lm: LanguageModel, text: str, *, window: int | None = None) -> float:
    """Return ``exp`` of the mean negative log likelihood per token.

    See `evaluate_text` for the protocol.

    Args:
        lm: a model, such as `jaxq.load_model` returns.
        text: any text with at least 2 tokens.
        window: tokens per window; None is the model's context, at most 2048.

    Raises:
        ValueError: when the text is too short, or the window too long.
    """
    return evaluate_text(lm, text, window=window).perplexity


def _check_same_tokens(lm: LanguageModel, other: LanguageModel, text: str) -> None:
    """Raise unless both models see the same tokens and predict as many."""
    sizes = int(lm.config.vocab_size), int(other.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the model knows {sizes[0]} tokens and the reference {sizes[1]}: give the "
            f"float model that this one was quantized from"
        )
    start = text[:10_000]
    if not np.array_equal(lm.encode(start), other.encode(start)):
        raise ValueError(
            "the reference's tokenizer cuts the text into other tokens: give the float "
            "model that this one was quantized from"
        )
