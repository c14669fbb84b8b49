"""RoBERTa: BERT whose positions count what is no padding, with another head."""

import flax.linen as nn
import jax

from jaxq.models.activations import ACTIVATIONS
from jaxq.models.bert import BertConfig, MaskedBert, read_encoder_shape, with_bias
from jaxq.models.block import Block
from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.norms import LayerNorm


class RobertaHead(Block):
    """The head for masked tokens, whose matrix is the table of embeddings."""

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Return logits, `float32[B, T, vocab]`."""
        x = self.dense(self.config.hidden_size, "dense", bias=True)(x)
        x = ACTIVATIONS["gelu"](x)
        x = LayerNorm(self.config.norm_eps, name="layer_norm")(x)
        return with_bias(self, x, table)


class MaskedRoberta(MaskedBert):
    """Token ids in, logits of the token at every place out."""

    def head(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Return logits of hidden states."""
        return self.part(RobertaHead, "lm_head")(x, table)


def read_roberta(keys: Keys) -> BertConfig:
    """Read the config of a RoBERTa.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    padding = keys.get("pad_token_id", 1)
    rows = keys.size("max_position_embeddings", 514)
    if rows <= padding + 1:
        raise ConfigError(
            f"config.json: max_position_embeddings {rows} leaves no position behind "
            f"those up to pad_token_id {padding}"
        )
    context = rows - padding - 1
    return BertConfig(**read_encoder_shape(keys), context=context, padding=padding)


def read_masked_roberta(keys: Keys) -> BertConfig:
    """Read the config of a RoBERTa whose head is its table of embeddings.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    keys.require("tie_word_embeddings", True)
    return read_roberta(keys)
