"""Small Linen models with all that recipes distinguish: tables, heads, routers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

VOCAB, WIDTH, INNER = 40, 64, 128


class Router(nn.Module):
    """Gates of two experts, and the experts as one stacked weight."""

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(2, name="router")(x))
        shape = (2, WIDTH, WIDTH)
        experts = self.param("experts", nn.initializers.lecun_normal(), shape)
        weighted = jnp.einsum("bte,btd->ebtd", gates, x)
        return jnp.einsum("ebtd,edf->ebtf", weighted, experts).sum(0)


class Block(nn.Module):
    """Norm, two products with biases, and a small mixture of experts."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        y = nn.Dense(INNER, name="up")(y)
        y = nn.Dense(WIDTH, name="down")(nn.gelu(y))
        return x + y + Router(name="moe")(x), None


class TinyLM(nn.Module):
    """Tokens to logits; ``tied`` reads the table as head, ``scanned`` stacks layers."""

    tied: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(VOCAB, WIDTH, name="embed")
        positions = nn.Embed(8, WIDTH, name="positions")
        x = table(tokens) + positions(jnp.arange(tokens.shape[-1]))
        if self.scanned:
            layers = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            x, _ = layers(name="layers")(x, None)
        else:
            x, _ = Block(name="layer_0")(x, None)
        x = nn.LayerNorm(name="norm")(x)
        if self.tied:
            return table.attend(x)
        return nn.Dense(VOCAB, use_bias=False, name="lm_head")(x)


def tokens(batch: int = 2) -> jax.Array:
    """Token ids ``[batch, 5]``."""
    ids = np.random.default_rng(5).integers(0, VOCAB, (batch, 5))
    return jnp.asarray(ids, jnp.int32)


def tiny_lm(**options: bool) -> tuple[Any, Any]:
    """Return (apply, abstract parameters) of a `TinyLM`."""
    model = TinyLM(**options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens())
    return model.apply, shapes


def filled(shapes: Any, seed: int = 0) -> Any:
    """Return random parameters of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes
    )
