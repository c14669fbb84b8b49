"""Text from a model, token by token, with a key/value cache.

Two functions are compiled: one that reads the prompts (once per bucket of lengths) and
one that makes a token (once per size of cache). Both take the model as a function, so
`jaxq.quantized(module.apply)` serves as well as `module.apply`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import FLOAT, PADDING, Cache, empty_cache
from jaxq.texts import next_power

SMALLEST_PROMPT = 16
SMALLEST_CACHE = 256  # so that short texts of any length share one compiled step
NOTHING = -1  # what a row that has ended yields


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: draw among the k most likely tokens; None among all.
        top_p: draw among the most likely tokens that together reach this probability
            (nucleus sampling, arXiv:1904.09751); None among all.
        seed: the same seed, prompts and model give the same text.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], or None")


GREEDY = Sampling()


def generate(  # noqa: PLR0913  one argument per choice
    apply: Callable[..., Any],
    params: Any,
    config: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    eos: tuple[int, ...] = (),
    cache: str = FLOAT,
) -> list[list[int]]:
    """Continue prompts of any lengths.

    Args:
        apply: `apply(params, tokens, positions, cache) -> (logits, cache)`. Pass the
            same function every time: another one is compiled anew.
        params: its first argument.
        config: of the model: `context` and what `empty_cache` reads.
        prompts: token ids; each row's text is the one it would get alone.
        max_new_tokens: at most so many tokens per prompt.
        sampling: how tokens are drawn.
        eos: tokens that end a text; they are not returned.
        cache: a key of `jaxq.kvcache.CACHES`: what keys and values are kept as.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: a prompt is empty, holds no token ids, or is longer with its new
            tokens than the model's context; or there is no such cache.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    steps = stream(apply, params, config, prompts, max_new_tokens, sampling, eos, cache)
    for tokens in steps:
        for text, token in zip(texts, tokens.tolist(), strict=True):
            if token != NOTHING:
                text.append(token)
    return texts


def stream(  # noqa: PLR0913  one argument per choice
    apply: Callable[..., Any],
    params: Any,
    config: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    eos: tuple[int, ...] = (),
    cache: str = FLOAT,
) -> Iterator[np.ndarray]:
    """Yield the next token of every prompt, `int32[prompts]`, as they are made.

    A row that has ended yields `NOTHING`; the stream ends when all have. Arguments and
    errors are those of `generate`.
    """
    lengths = _check(prompts, max_new_tokens, config)
    tokens, positions = pad(prompts, _bucket(max(lengths), SMALLEST_PROMPT))
    slots = _bucket(tokens.shape[1] + max_new_tokens, SMALLEST_CACHE)
    held = empty_cache(config, len(prompts), slots, float_dtype(params), cache)
    logits, held = _prefill(apply, params, tokens, positions, held)
    begun = Begun(logits, jnp.asarray(lengths, jnp.int32), held)
    yield from write(apply, params, begun, max_new_tokens, sampling, eos)


class Begun(NamedTuple):
    """What has been read, before the first token is written.

    Attributes:
        logits: of the first token, `float32[rows, vocab]`.
        place: its position, `int32[rows]`.
        cache: of what was read; it is used up.
    """

    logits: jax.Array
    place: jax.Array
    cache: Any


def write(
    apply: Callable[..., Any],
    params: Any,
    begun: Begun,
    max_new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
) -> Iterator[np.ndarray]:
    """Yield the next token of every row, as `stream` does.

    Args:
        apply: `apply(params, tokens, positions, cache) -> (logits, cache)`; equal ones
            share what they compiled.
        params: its first argument.
        begun: where to begin.
        max_new_tokens: at most so many tokens.
        sampling: how they are drawn.
        eos: tokens that end a row.
    """
    logits, place, held = begun
    draw = partial(_draw, knobs=_knobs(sampling), greedy=sampling.temperature == 0)
    latest = draw(logits, step=jnp.int32(0))
    ended = np.zeros(len(logits), bool)
    for step in range(1, max_new_tokens + 1):
        made = np.asarray(latest)
        ended = ended | np.isin(made, eos)
        if ended.all():
            return
        yield np.where(ended, np.int32(NOTHING), made)
        if step < max_new_tokens:
            logits, held = _step(apply, params, latest, place, held)
            latest = draw(logits, step=jnp.int32(step))
            place = place + jnp.int32(1)


@dataclass(frozen=True)
class ThroughCache:
    """`apply` as a function that reads a text through a cache of a kind.

    Called without a cache, `apply(params, tokens)` gives the logits that writing the
    text token by token would: what a query attends to has been in the cache. With one
    it is `apply`. Two of the same fields are equal, and share what they compiled.

    Attributes:
        apply: `apply(params, tokens, positions, cache) -> (logits, cache)`.
        config: of the model: what `empty_cache` reads.
        cache: a key of `jaxq.kvcache.CACHES`.

    Raises:
        ValueError: there is no such cache, or the model's heads cannot be packed so.
    """

    apply: Callable[..., Any]
    config: Any
    cache: str

    def __post_init__(self) -> None:
        jax.eval_shape(lambda: self.empty_cache(1, 1, jnp.float32))

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        held: Cache | None = None,
    ) -> Any:
        """Return logits `[B, T, vocab]`; with a cache, that and the longer cache."""
        return _read(self, params, tokens, positions, held)

    def empty_cache(self, rows: int, tokens: int, dtype: Any) -> Cache:
        """Return a cache for texts of so many tokens."""
        return empty_cache(self.config, rows, tokens, dtype, self.cache)


@partial(jax.jit, static_argnums=0)
def _read(
    through: ThroughCache,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None,
    held: Cache | None,
) -> Any:
    if held is not None:
        return through.apply(params, tokens, positions, held)
    rows, length = tokens.shape
    made = through.empty_cache(rows, length, float_dtype(params))
    return through.apply(params, tokens, positions, made)[0]


def pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[jax.Array, jax.Array]:
    """Return tokens and positions, both `int32[prompts, length]`, padded on the right.

    Padding has the position that nothing attends to, so it does not matter where it is
    nor which token stands there.
    """
    tokens = np.zeros((len(prompts), length), np.int32)
    positions = np.full((len(prompts), length), PADDING, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    return jnp.asarray(tokens), jnp.asarray(positions)


@partial(jax.jit, static_argnames="apply")
def _prefill(
    apply: Callable[..., Any],
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Read the prompts; return the logits after each one's last token."""
    logits, cache = apply(params, tokens, positions, cache)
    last = jnp.argmax(positions, axis=1)[:, None, None]
    return jnp.take_along_axis(logits, last, axis=1)[:, 0], cache


@partial(jax.jit, static_argnames="apply", donate_argnames="cache")
def _step(
    apply: Callable[..., Any],
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Read one token per row; return the logits after it."""
    logits, cache = apply(params, tokens[:, None], positions[:, None], cache)
    return logits[:, 0], cache


@partial(jax.jit, static_argnames="greedy")
def _draw(
    logits: jax.Array, step: jax.Array, knobs: dict[str, jax.Array], greedy: bool
) -> jax.Array:
    """Draw a token per row of `float32[rows, vocab]`, each by its index."""
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / knobs["temperature"]
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    ranked = jnp.where(rank < knobs["top_k"], ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    kept = (before < knobs["top_p"]) | (rank == 0)
    ranked = jnp.where(kept, ranked, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(knobs["seed"]), step)
    rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    picked = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, picked[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _knobs(sampling: Sampling) -> dict[str, jax.Array]:
    """Return the sampling settings as arrays, so that new values need no new trace."""
    everything = np.iinfo(np.int32).max
    return {
        "temperature": jnp.float32(sampling.temperature),
        "top_k": jnp.int32(everything if sampling.top_k is None else sampling.top_k),
        "top_p": jnp.float32(2.0 if sampling.top_p is None else sampling.top_p),
        "seed": jnp.uint32(sampling.seed % 2**32),
    }


def _bucket(length: int, smallest: int) -> int:
    """Return the power of two that `length` is padded to, from `smallest` on."""
    return max(smallest, next_power(length))


def float_dtype(params: Any) -> Any:
    """Return the dtype of the parameters where all floats agree, else float32."""
    leaves = [x.dtype for x in jax.tree.leaves(params)]
    floats = {dtype for dtype in leaves if jnp.issubdtype(dtype, jnp.floating)}
    return floats.pop() if len(floats) == 1 else jnp.float32


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: Any
) -> list[int]:
    """Return the lengths of prompts that can be continued; refuses others."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {row} has no tokens; begin with at least one, for instance "
                "the token that begins a text"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt {row} holds the token {low if low < 0 else high}, but the "
                f"model knows 0 to {config.vocab_size - 1}; is the tokenizer another's?"
            )
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) + max_new_tokens > config.context:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones are "
            f"{max(lengths) + max_new_tokens}, more than the model's context of "
            f"{config.context}; shorten the prompt or lower max_new_tokens to "
            f"{max(config.context - max(lengths), 0)}"
        )
    return lengths
