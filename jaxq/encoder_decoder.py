"""`EncoderDecoder`: one text in, another out, from a float or quantized model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.generation import SMALLEST_CACHE, Begun, Sampling, float_dtype, write
from jaxq.kvcache import CrossCache, cross_cache
from jaxq.model import Model
from jaxq.texts import next_power

SHORTEST = 16


@dataclasses.dataclass(frozen=True, repr=False)
class EncoderDecoder(Model):
    """An encoder with a decoder, such as T5.

    Immutable: `quantize` returns another one. Made by `load_model`.
    ``apply(params, tokens[B, S], targets[B, T], mask[B, S] = None)`` returns
    ``float32[B, T, vocab]``, the logits of the token after every token of the target.
    With ``cache=`` (see `empty_cache`) it returns them and the longer cache, with which
    ``apply(params, None, targets, None, cache)`` goes on with the same text. Other
    attributes: see `Model`.

    Attributes:
        eos: the tokens that end a text.
    """

    eos: tuple[int, ...] = ()

    def inputs(self, tokens: jax.Array) -> tuple[jax.Array, ...]:
        """Return what ``apply`` takes for texts that are read and written again."""
        start = jnp.full((tokens.shape[0], 1), self.config.start, tokens.dtype)
        return tokens, jnp.concatenate([start, tokens[:, :-1]], axis=1)

    def empty_cache(self, tokens: int, batch: int = 1) -> CrossCache:
        """Return a cache for writing so many tokens, to give to ``apply``.

        It keeps the keys and values of what is written, and those of the text that is
        read, projected once. What is written beyond its end overwrites older tokens.

        Args:
            tokens: per text, the one that begins it included.
            batch: texts.
        """
        return cross_cache(self.config, batch, tokens, float_dtype(self.params))

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Return the text that the model writes for ``prompt``.

        Args:
            prompt: any text, with its task where the model wants one.
            max_new_tokens: at most so many tokens; fewer when the text ends.
            temperature: 0 takes the likeliest token every time; otherwise tokens are
                drawn, from logits divided by it.
            top_k: draw among the k likeliest tokens only.
            top_p: draw among the likeliest tokens that together reach this probability.
            seed: the same seed gives the same text.

        Raises:
            ValueError: when the model has no tokenizer, there is nothing to do, or a
                setting is out of its range.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        if max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; it must be 1 or more"
            )
        ids = self.tokens_of(prompt)
        if not len(ids):
            raise ValueError("the prompt has no tokens; give at least one")
        begun, params = self._read(ids, max_new_tokens), self.params
        steps = write(
            Writer(self.apply), params, begun, max_new_tokens, sampling, self.eos
        )
        return self.decode([int(tokens[0]) for tokens in steps])

    def _read(self, ids: np.ndarray, new: int) -> Begun:
        """Read a text, and the token that begins another one of ``new`` tokens."""
        tokens = np.zeros((1, max(SHORTEST, next_power(len(ids)))), np.int32)
        tokens[0, : len(ids)] = ids
        mask = jnp.arange(tokens.shape[1])[None] < len(ids)
        start = jnp.full((1, 1), self.config.start, jnp.int32)
        # the last token is written, and not read again
        cache = self.empty_cache(max(SMALLEST_CACHE, next_power(new)))
        logits, cache = self.apply(self.params, jnp.asarray(tokens), start, mask, cache)
        return Begun(logits[:, 0], jnp.ones(1, jnp.int32), cache)


@dataclasses.dataclass(frozen=True)
class Writer:
    """An encoder-decoder's ``apply`` as that of a decoder; the text is in the cache."""

    apply: Callable[..., Any]

    def __call__(
        self, params: Any, tokens: jax.Array, positions: jax.Array, cache: CrossCache
    ) -> tuple[jax.Array, CrossCache]:
        """Return logits ``float32[B, T, vocab]`` and the longer cache."""
        del positions  # they go on from where the cache ends
        return self.apply(params, None, tokens, None, cache)
