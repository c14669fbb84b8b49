"""`EncoderDecoder`: one text in, another out, from a float or quantized model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.model import Model
from jaxq.texts import next_power

SHORTEST = 16


@dataclasses.dataclass(frozen=True, repr=False)
class EncoderDecoder(Model):
    """An encoder with a decoder, such as T5.

    Immutable: `quantize` returns another one. Made by `load_model`.
    ``apply(params, tokens[B, S], targets[B, T], mask[B, S] = None)`` returns
    ``float32[B, T, vocab]``, the logits of the token after every token of the target.
    Other attributes: see `Model`.

    Attributes:
        eos: the tokens that end a text.
    """

    eos: tuple[int, ...] = ()

    def inputs(self, tokens: jax.Array) -> tuple[jax.Array, ...]:
        """Return what ``apply`` takes for texts that are read and written again."""
        start = jnp.full((tokens.shape[0], 1), self.config.start, tokens.dtype)
        return tokens, jnp.concatenate([start, tokens[:, :-1]], axis=1)

    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Return the likeliest text for a prompt, token by token.

        Every token reads the prompt and what is written anew: there is no cache.

        Args:
            prompt: any text, with its task where the model wants one.
            max_new_tokens: at most so many tokens; fewer when the text ends.

        Raises:
            ValueError: when the model has no tokenizer, or there is nothing to do.
        """
        if max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; it must be 1 or more"
            )
        ids = self.tokens_of(prompt)
        if not len(ids):
            raise ValueError("the prompt has no tokens; give at least one")
        width = max(SHORTEST, next_power(len(ids)))
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        mask = jnp.arange(tokens.shape[1])[None] < len(ids)
        width = max(SHORTEST, next_power(max_new_tokens))
        targets = np.zeros((1, width), np.int32)
        targets[0, 0] = self.config.start
        made: list[int] = []
        # what is not written yet stands behind, where nothing looks
        while len(made) < max_new_tokens:
            logits = self.apply(self.params, jnp.asarray(tokens), targets, mask)
            token = int(jnp.argmax(logits[0, len(made)]))
            if token in self.eos:
                break
            made.append(token)
            if len(made) < targets.shape[1]:
                targets[0, len(made)] = token
        return self.decode(made)
