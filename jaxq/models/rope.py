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
        fraction: the share of a head that turns; the rest stays (GPT-NeoX, Phi).
        kind: a key of `BENDS`; the fields below matter for the kinds they name.
        factor: linear, dynamic, llama3, yarn: how many times longer the context became.
        low_freq_factor: llama3: wavelengths above `original_context / this` stretch.
        high_freq_factor: llama3: wavelengths below `original_context / this` stay.
        original_context: dynamic, llama3, yarn, longrope: tokens the model was first
            trained on.
        beta_fast: yarn: pairs that turn more often than this in that context are kept.
        beta_slow: yarn: pairs that turn less often than this are stretched.
        truncate: yarn: the bounds of the ramp are rounded to whole pairs.
        short: longrope: what divides each frequency in texts up to that context.
        long: longrope: what divides it in longer ones.
        amplitude: what cos and sin are multiplied by: the attention factor of yarn and
            longrope.
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
    fraction: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def width(self, head_dim: int) -> int:
        """Return how many elements of a head turn."""
        return int(head_dim * self.fraction)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return radians per position, `float32[pairs]`, in texts of the usual length."""
    return BENDS[rope.kind](rope, _plain(rope, head_dim)).astype(np.float32)


def frequencies_at(rope: Rope, head_dim: int, positions: jax.Array) -> jax.Array:
    """Return radians per position, `float32[batch or 1, 1, pairs]`.

    They depend on how long a text has become for the kinds in `LENGTH_BENDS`, and then
    every row of the batch has its own.

    Args:
        rope: the angles.
        head_dim: the width of a head.
        positions: `int[batch, tokens]` of the latest tokens.
    """
    usual = jnp.asarray(frequencies(rope, head_dim))
    bend = LENGTH_BENDS.get(rope.kind)
    if bend is None:
        return usual[None, None]
    tokens = jnp.max(positions, axis=1)[:, None, None] + 1
    longer = bend(rope, _plain(rope, head_dim), tokens)
    return jnp.where(tokens > rope.original_context, longer, usual)


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotate heads by their positions.

    `(a, b) -> (a cos - b sin, b cos + a sin)` where `a` and `b` are the two halves of
    what turns of a head: the pairing of Hugging Face's Llama, not the interleaved one
    of the paper (arXiv:2104.09864).

    Args:
        x: `[batch, tokens, heads, head_dim]`.
        positions: `int[batch, tokens]`.
        rope: the angles.

    Returns:
        The rotated heads, in the dtype of `x`; the arithmetic is float32.
    """
    width = rope.width(x.shape[-1])
    cos, sin = _tables(rope, x.shape[-1], positions)
    turning = x[..., :width].astype(jnp.float32)
    other = jnp.roll(turning, width // 2, axis=-1)
    whole = (turning * cos[:, :, None] + other * sin[:, :, None]).astype(x.dtype)
    still = x[..., width:]
    return jnp.concatenate([whole, still], axis=-1) if still.shape[-1] else whole


def _tables(
    rope: Rope, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what every element is multiplied by, and the other one of its pair.

    Behind a barrier: XLA would compute the angles anew for each head.
    """
    radians = frequencies_at(rope, head_dim, positions)
    angles = positions.astype(jnp.float32)[..., None] * radians
    gain = jnp.float32(rope.amplitude)
    cos, sin = jnp.cos(angles) * gain, jnp.sin(angles) * gain
    twice = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return jax.lax.optimization_barrier(twice)


def _plain(rope: Rope, head_dim: int) -> np.ndarray:
    """Return `theta ** (-2 i / width)` of every pair."""
    width = rope.width(head_dim)
    return rope.theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)


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


def _longrope(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Every wave has a factor of its own (arXiv:2402.13753)."""
    return plain / np.asarray(rope.short, np.float64)


def _longrope_longer(rope: Rope, plain: np.ndarray, tokens: jax.Array) -> jax.Array:
    del tokens
    return jnp.asarray(plain / np.asarray(rope.long, np.float64), jnp.float32)


def _dynamic_longer(rope: Rope, plain: np.ndarray, tokens: jax.Array) -> jax.Array:
    """The base grows with the text, so that its longest wave still spans it.

    `theta' = theta (factor tokens / context - factor + 1) ** (d / (d - 2))`.
    """
    width = 2 * len(plain)
    share = tokens.astype(jnp.float32) / jnp.float32(rope.original_context)
    factor = jnp.float32(rope.factor)
    growth = jnp.maximum(factor * share - (factor - jnp.float32(1)), jnp.float32(1))
    power = -np.arange(0, width, 2, dtype=np.float64) / (width - 2)
    return jnp.asarray(plain, jnp.float32) * growth ** jnp.asarray(power, jnp.float32)


BENDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
# the kinds that also bend by the length of the text
LENGTH_BENDS = {"dynamic": _dynamic_longer, "longrope": _longrope_longer}
