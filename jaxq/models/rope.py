"""Rotary position embeddings: the angle of every pair, and how it is bent."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """Which angles a model rotates its queries and keys by.

    Pair `i` of a head of width `d` turns by `position * frequency[i]`, where
    `frequency[i] = theta ** (-2 i / d)` before the scaling that `kind` names.

    Attributes:
        theta: the base of the geometric series of wavelengths.
        kind: a key of `BENDS`; the fields below matter for the kinds they name.
        factor: linear, llama3, yarn: how many times longer the context became.
        low_freq_factor: llama3: wavelengths above `original_context / this` stretch.
        high_freq_factor: llama3: wavelengths below `original_context / this` stay.
        original_context: llama3, yarn: tokens the model was first trained on.
        beta_fast: yarn: pairs that turn more often than this in that context are kept.
        beta_slow: yarn: pairs that turn less often than this are stretched.
        truncate: yarn: the bounds of the ramp are rounded to whole pairs.
        amplitude: what cos and sin are multiplied by; yarn's attention factor.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return radians per position, `float32[head_dim // 2]`."""
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return BENDS[rope.kind](rope, plain).astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotate heads by their positions.

    `(a, b) -> (a cos - b sin, b cos + a sin)` where `a` and `b` are the two halves of a
    head: the pairing of Hugging Face's Llama, not the interleaved one of the paper
    (arXiv:2104.09864).

    Args:
        x: `[batch, tokens, heads, head_dim]`.
        positions: `int[batch, tokens]`.
        rope: the angles.

    Returns:
        The rotated heads, in the dtype of `x`; the arithmetic is float32.
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies(rope, x.shape[-1])
    gain = jnp.float32(rope.amplitude)
    cos = (jnp.cos(angles) * gain)[:, :, None, :]
    sin = (jnp.sin(angles) * gain)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _default(rope: Rope, plain: np.ndarray) -> np.ndarray:
    del rope
    return plain


def _linear(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Every wave is stretched by the factor (arXiv:2306.15595)."""
    return plain / rope.factor


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_context * plain / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """A linear ramp over the pairs from kept to stretched (arXiv:2309.00071, 3.2)."""
    head_dim = 2 * len(plain)

    def pair_turning(turns: float) -> float:
        wave = rope.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(len(plain)) - low) / width, 0.0, 1.0)
    return (1 - ramp) * plain + ramp * plain / rope.factor


BENDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
