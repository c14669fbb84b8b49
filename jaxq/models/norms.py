"""The norms of transformers; both compute in float32, whatever they are given."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * (offset + weight)` over the last axis.

    Attributes:
        eps: keeps the root from zero.
        offset: 1 where the checkpoint stores what the weight differs from 1 by (Gemma).
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalized `x[..., width]`, in its dtype."""
        fresh = nn.initializers.constant(1.0 - self.offset)
        weight = self.param("weight", fresh, (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(square + jnp.float32(self.eps))
        if self.offset:
            weight = jnp.float32(self.offset) + weight
        return (normed * weight).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalized `x[..., width]`, in its dtype."""
        width = (x.shape[-1],)
        weight = self.param("weight", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + jnp.float32(self.eps))
        scaled = normed * weight.astype(jnp.float32) + bias.astype(jnp.float32)
        return scaled.astype(x.dtype)
