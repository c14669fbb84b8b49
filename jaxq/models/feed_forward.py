"""`FeedForward`: two projections with an activation between them."""

import flax.linen as nn
import jax

from jaxq.models.activations import ACTIVATIONS
from jaxq.models.block import Block


class FeedForward(Block):
    """`down(act(up(x)))`; a family that calls the projections otherwise says how."""

    up, down = "dense_h_to_4h", "dense_4h_to_h"

    @property
    def bias(self) -> bool:
        """Whether the projections have one."""
        return True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the feed-forward output for `x[B, T, hidden]`."""
        cfg = self.config
        inner = self.dense(cfg.intermediate_size, self.up, self.bias)(x)
        inner = ACTIVATIONS[cfg.activation](inner)
        return self.dense(cfg.hidden_size, self.down, self.bias)(inner)
