"""Attention over a cache of codes: which kernel runs, and why the others declined."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxq.kvcache.quantized import QuantizedLayer
from jaxq.ops import Choice
from jaxq.ops.parallel import divided_mesh
from pallas_kernels.target import Target, generations
from pallas_kernels.xla.cached_attention import cached_attention


@dataclasses.dataclass(frozen=True)
class Problem:
    """`softmax(cap(q k^T scale) + bias) v` over what a layer's cache holds.

    The tokens of a row lie in the order of their positions, one at each.

    Attributes:
        q: `[B, T, heads, head_dim]`.
        layer: codes and scales, those of the queries' own tokens included.
        positions: `int[B, T]`, where the queries stand; negative for padding.
        key_positions: `int[B, slots]`.
        window: how many tokens back a query sees; None sees all.
        scale: of the scores; None is `1 / sqrt(head_dim)`.
        cap: bounds the scores.
        bias: added to them, `[B or 1, heads, T or 1, slots]`.
    """

    q: jax.Array
    layer: QuantizedLayer
    positions: jax.Array
    key_positions: jax.Array
    window: int | None = None
    scale: float | None = None
    cap: float | None = None
    bias: jax.Array | None = None

    @property
    def codes(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Keys, values, and the scales of both."""
        layer = self.layer
        return layer.keys, layer.values, layer.key_scales, layer.value_scales

    @property
    def lengths(self) -> jax.Array:
        """How many slots of a row are filled, `int32[B]`."""
        return _count(self.key_positions >= 0)

    @property
    def span(self) -> tuple[jax.Array | None, jax.Array]:
        """The first slot that a row's only query sees, and the one behind the last.

        Without a window the first is None: it is slot 0.
        """
        key, query = self.key_positions, self.positions[:, :1]
        ends = _count((key >= 0) & (key <= query))
        if self.window is None:
            return None, ends
        return _count((key >= 0) & (key <= query - self.window)), ends


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: shown by `explain_cache`.
        backends: where it may run.
        declines: the reason it does not take a problem on a chip, or None.
        run: `[B, T, heads, head_dim]` in the dtype of `q`.
    """

    name: str
    backends: tuple[str, ...]
    declines: Callable[[Problem, Target], str | None]
    run: Callable[[Problem, Target], jax.Array]


def attend(p: Problem) -> tuple[jax.Array, QuantizedLayer]:
    """Return the attention, and the layer with the choice noted where it asks so."""
    target = Target.here() if p.layer.target is None else p.layer.target
    kernel, choice = choose(p, target)
    noted, mixed = p.layer.choices, kernel.run(p, target)
    if noted is None:
        return mixed, p.layer
    return mixed, dataclasses.replace(p.layer, choices=(*noted, choice))


def choose(p: Problem, target: Target) -> tuple[Kernel, Choice]:
    """Return the first kernel of a chip that takes the problem, and the record."""
    declined: list[tuple[str, str]] = []
    for kernel in KERNELS:
        if target.backend not in kernel.backends:
            continue
        reason = kernel.declines(p, target)
        if reason is None:
            return kernel, Choice(kernel.name, tuple(declined))
        declined.append((kernel.name, reason))
    raise RuntimeError("the last kernel of the table must take every problem")


def _count(slots: jax.Array) -> jax.Array:
    """Return how many of each row are true, `int32[B]`."""
    return jnp.sum(slots, axis=1, dtype=jnp.int32)


def _unusual(p: Problem) -> str | None:
    """Return what of the problem no kernel of a chip knows, or None."""
    if p.q.shape[1] != 1:
        return f"{p.q.shape[1]} tokens at once: it attends from one"
    mesh = divided_mesh(p.q, p.layer.keys)
    if mesh is not None:
        return f"it runs on one device, not on {dict(mesh.shape)}: use jax.shard_map"
    return None


def _tpu_declines(p: Problem, target: Target) -> str | None:
    if target.generation not in generations("tpu"):
        return f"not for {target.generation or 'this kind of tpu'}"
    if p.layer.keys.dtype == jnp.uint8:
        return "codes of 4 bits lie in bytes: make the cache for a tpu"
    return _unusual(p)


def _bias(p: Problem) -> jax.Array | None:
    """Return the bias of the only query, `[B or 1, heads, slots]`, or None."""
    return None if p.bias is None else p.bias[:, :, 0]


def _tpu_run(p: Problem, target: Target) -> jax.Array:
    from pallas_kernels.tpu.decode_attention import decode_attention

    starts, ends = p.span
    out = decode_attention(
        p.q[:, 0],
        *p.codes,
        ends,
        starts=starts,
        bias=_bias(p),
        window=p.window,
        scale=p.scale,
        cap=p.cap,
        interpret=target.interpret,
    )
    return out[:, None]


def _gpu_declines(p: Problem, target: Target) -> str | None:
    if target.generation not in generations("gpu"):
        return f"not for {target.generation or 'this kind of gpu'}"
    if p.layer.keys.dtype == jnp.int4:
        return "codes are native int4: make the cache for a gpu"
    channels = p.layer.keys.shape[3]
    if channels < 16 or channels & (channels - 1):
        return f"{channels} bytes per head are no power of two from 16 on"
    if p.layer.slots % 64:
        return f"{p.layer.slots} slots are no multiple of 64"
    return _unusual(p)


def _gpu_run(p: Problem, target: Target) -> jax.Array:
    from pallas_kernels.gpu.decode_attention import decode_attention

    batch, _, heads, width = p.q.shape
    cached = p.layer.keys.shape[1]
    starts, ends = p.span
    keys, values = (
        jax.lax.bitcast_convert_type(codes, jnp.uint8) for codes in p.codes[:2]
    )
    out = decode_attention(
        p.q.reshape(batch, cached, heads // cached, width),
        keys,
        values,
        *p.codes[2:],
        ends,
        bits=p.layer.spec.bits,
        starts=starts,
        bias=_bias(p),
        scale=p.scale,
        cap=p.cap,
        interpret=bool(target.interpret),
    )
    return out.reshape(p.q.shape)


def _xla_run(p: Problem, target: Target) -> jax.Array:
    del target
    return cached_attention(
        p.q,
        *p.codes,
        p.positions,
        p.key_positions,
        p.lengths,
        window=p.window,
        scale=p.scale,
        cap=p.cap,
        bias=p.bias,
    )


# In order of preference. The last takes everything.
KERNELS: tuple[Kernel, ...] = (
    Kernel("tpu.decode_attention", ("tpu",), _tpu_declines, _tpu_run),
    Kernel("gpu.decode_attention", ("gpu",), _gpu_declines, _gpu_run),
    Kernel(
        "xla.cached_attention", ("cpu", "gpu", "tpu"), lambda p, target: None, _xla_run
    ),
)
