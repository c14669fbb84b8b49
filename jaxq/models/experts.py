"""Mixtures of experts: every token goes to the few that its router picks.

The weights of all experts are one variable, `[experts, in, out]`, met by
`jax.lax.ragged_dot`: tokens are sorted by expert, and each expert multiplies its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.models.activations import ACTIVATIONS
from jaxq.models.block import Block, wide_dot
from jaxq.models.causal import Places
from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.llama import MLP, DecoderLayer, Llama, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(LlamaConfig):
    """The shape of a Llama-like model with experts.

    Attributes:
        num_experts: in every sparse layer.
        per_token: how many each token goes to.
        expert_size: the width between an expert's projections.
        shared_size: the same of the expert that all tokens go to; None without one.
        normalized: the weights of a token's experts are made to sum to 1.
        sparse: which layers have experts; the others have an ordinary feed-forward.
    """

    num_experts: int
    per_token: int
    expert_size: int
    shared_size: int | None = None
    normalized: bool = True
    sparse: tuple[bool, ...] = ()


class Experts(Block):
    """The experts of one layer: `down(act(gate(x)) * up(x))` each."""

    NAMES: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")

    @nn.compact
    def __call__(
        self, x: jax.Array, chosen: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Return `sum_j weights[m, j] expert_{chosen[m, j]}(x[m])`.

        Args:
            x: `[M, hidden]`.
            chosen: `int[M, k]`; a number behind the last expert's is nobody.
            weights: `float32[M, k]`.

        Returns:
            `[M, hidden]`.
        """
        cfg = self.config
        gate, up, down = self.NAMES
        picked = chosen.reshape(-1)
        order = jnp.argsort(picked)  # stable: the tokens of an expert stay in order
        sizes = jnp.bincount(picked, length=cfg.num_experts).astype(jnp.int32)
        rows = x[order // chosen.shape[1]]
        inner = ACTIVATIONS[cfg.activation](
            self._multiply(rows, gate, cfg.expert_size, sizes)
        )
        inner = inner * self._multiply(rows, up, cfg.expert_size, sizes)
        outer = self._multiply(inner, down, cfg.hidden_size, sizes)
        # what lies behind the last expert's rows is nobody's, and may be anything
        owned = (picked[order] < cfg.num_experts)[:, None]
        outer = jnp.where(owned, outer.astype(jnp.float32), jnp.float32(0))
        back = outer[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return jnp.sum(back * weights[..., None], axis=1).astype(x.dtype)

    def _multiply(
        self, rows: jax.Array, name: str, features: int, sizes: jax.Array
    ) -> jax.Array:
        shape = (self.config.num_experts, rows.shape[-1], features)
        fresh = nn.initializers.normal(self.config.init_scale)
        weight = self.param(name, fresh, shape)
        dtype = rows.dtype if self.dtype is None else self.dtype
        y = jax.lax.ragged_dot(
            rows.astype(dtype),
            weight.astype(dtype),
            sizes,
            preferred_element_type=jnp.float32,
        )
        return y.astype(dtype)


class SparseMLP(Block):
    """A router, experts, and maybe one expert that every token goes to."""

    @nn.compact
    def __call__(self, x: jax.Array, places: Places) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        cfg = self.config
        flat = x.reshape(-1, x.shape[-1])
        router = nn.Dense(
            cfg.num_experts,
            use_bias=False,
            dtype=self.dtype,
            dot_general=wide_dot,
            kernel_init=nn.initializers.normal(cfg.init_scale),
            name="gate",
        )
        chances = jax.nn.softmax(router(flat).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(chances, cfg.per_token)
        if cfg.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        padding = places.queries.reshape(-1, 1) < 0
        chosen = jnp.where(padding, jnp.int32(cfg.num_experts), chosen)
        mixed = self.part(self.experts(), "experts")(flat, chosen, weights)
        if cfg.shared_size is not None:
            gate = self.dense(1, "shared_expert_gate")(flat)
            shared = self.part(SharedExpert, "shared_expert")(flat[None])[0]
            mixed = mixed + jax.nn.sigmoid(gate) * shared
        return mixed.reshape(x.shape)

    def experts(self) -> type[Experts]:
        """Return the class of the experts."""
        return Experts


class SharedExpert(MLP):
    """The expert that every token goes to."""

    def inner(self) -> int:
        """Return the width between the projections."""
        return self.config.shared_size


class SparseLayer(DecoderLayer):
    """A decoder layer whose feed-forward part may be a mixture of experts."""

    def feed_forward(self, x: jax.Array, places: Places) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        if self.config.sparse[self.layer]:
            return self.part(SparseMLP, "mlp")(x, places)
        return super().feed_forward(x, places)


class SparseLlama(Llama):
    """A Llama whose layers may have experts."""

    def layer_kind(self) -> type[DecoderLayer]:
        """Return the class of the layers."""
        return SparseLayer


def read_experts(keys: Keys, count: str, layers: int) -> dict[str, Any]:
    """Read what Qwen's mixtures have in common.

    Args:
        keys: the config.
        count: the key of the number of experts.
        layers: how many there are.

    Raises:
        ConfigError: a number is senseless.
    """
    dense = keys.get("mlp_only_layers", [])
    step = keys.size("decoder_sparse_step", 1)
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    experts = {
        "num_experts": keys.count(count),
        "per_token": keys.size("num_experts_per_tok"),
        "expert_size": keys.size("moe_intermediate_size"),
        "normalized": keys.flag("norm_topk_prob"),
        "sparse": sparse,
    }
    check_picks(experts)
    return experts


def check_picks(experts: dict[str, Any]) -> None:
    """Refuse to pick more experts than there are.

    Raises:
        ConfigError: it says so.
    """
    if experts["per_token"] > experts["num_experts"]:
        raise ConfigError(
            f"config.json: num_experts_per_tok {experts['per_token']} is more than the "
            f"{experts['num_experts']} experts there are"
        )
