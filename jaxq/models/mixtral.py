"""Mixtral: Mistral with eight experts in every layer."""

from typing import ClassVar

import jax

from jaxq.models.causal import Places
from jaxq.models.experts import (
    Experts,
    ExpertsConfig,
    SparseMLP,
    check_picks,
)
from jaxq.models.hf_config import Keys
from jaxq.models.llama import DecoderLayer, Llama, read_llama_shape, with_rope


class MixtralExperts(Experts):
    """The same experts under other names."""

    NAMES: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")


class MixtralMLP(SparseMLP):
    """A router and experts."""

    def experts(self) -> type[Experts]:
        """Return the class of the experts."""
        return MixtralExperts


class MixtralLayer(DecoderLayer):
    """A decoder layer with experts."""

    def feed_forward(self, x: jax.Array, places: Places) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        return self.part(MixtralMLP, "block_sparse_moe")(x, places)


class Mixtral(Llama):
    """Token ids in, logits out."""

    def layer_kind(self) -> type[DecoderLayer]:
        """Return the class of the layers."""
        return MixtralLayer


def read_mixtral(keys: Keys) -> ExpertsConfig:
    """Read the config of a Mixtral.

    Raises:
        ConfigError: something is missing, senseless or not implemented.
    """
    shape = with_rope(keys, read_llama_shape(keys))
    window = keys.given("sliding_window")
    experts = {
        "num_experts": keys.count("num_local_experts"),
        "per_token": keys.size("num_experts_per_tok"),
    }
    check_picks(experts)
    return ExpertsConfig(
        **shape,
        **experts,
        expert_size=shape["intermediate_size"],
        windows=() if window is None else (window,) * shape["num_layers"],
    )
