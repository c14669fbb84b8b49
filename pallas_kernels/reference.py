"""What the kernels compute, in plain jnp and float32, and the cases to compare with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.epilogue import activation


@dataclasses.dataclass(frozen=True)
class Case:
    """A product for tests and benchmarks.

    Attributes:
        name: what is special about it.
        rows: M.
        inner: K.
        columns: N.
        weight: the dtype of the stored elements.
        group: rows per scale, or None for one per column.
        zeros: whether there are zero points.
        layers: stacked weights, or None.
        dtype: of the activation.
        scale: the dtype of the scales.
        rounded: what the activation is rounded to, or None.
        options: whether there are a bias, an input scale and an epilogue.
    """

    name: str
    rows: int
    inner: int
    columns: int
    weight: str
    group: int | None
    zeros: bool = False
    layers: int | None = None
    dtype: str = "bfloat16"
    scale: str = "float32"
    rounded: str | None = None
    options: bool = False

    @property
    def group_rows(self) -> int:
        """Rows per scale."""
        return self.inner if self.group is None else self.group

    def arrays(self, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
        """Return random arguments of a kernel: positional ones and options."""
        random = np.random.default_rng(seed)
        lead = () if self.layers is None else (self.layers,)
        groups = -(-self.inner // self.group_rows)
        x = random.standard_normal((self.rows, self.inner)).astype(self.dtype)
        codes = elements(random, (*lead, self.inner, self.columns), self.weight)
        shape = (*lead, groups, self.columns)
        scales = random.uniform(0.005, 0.02, shape).astype(self.scale)
        zeros = random.integers(-5, 6, shape).astype(np.int32) if self.zeros else None
        layer = None if self.layers is None else jnp.int32(self.layers - 1)
        options: dict[str, Any] = {"group": self.group_rows}
        if self.options:
            options |= {
                "bias": random.standard_normal(self.columns).astype(np.float32),
                "input_scale": random.uniform(0.5, 2, self.inner).astype(np.float32),
                "epilogue": "silu",
                "factor": 0.5,
            }
        if self.rounded is not None:
            scaled = np.asarray(x, np.float32) * options.get("input_scale", 1)
            most = 127 if self.rounded == "int8" else 448
            x_scale = np.max(np.abs(scaled), 1, keepdims=True) / most
            options |= {"x_scale": x_scale, "rounded": self.rounded}
        return [x, codes, scales, zeros, layer], options


def elements(
    random: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> jax.Array:
    """Return random weights in their stored dtype, over its whole range."""
    if dtype.startswith("float8"):
        return jnp.asarray(random.standard_normal(shape), jnp.float32).astype(dtype)
    info = jnp.iinfo(dtype)
    numbers = random.integers(int(info.min), int(info.max) + 1, shape)
    return jnp.asarray(numbers, jnp.int32).astype(dtype)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    group: int,
    factor: float = 1.0,
    bias: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    epilogue: str | None = None,
    x_scale: jax.Array | None = None,
    rounded: DTypeLike | None = None,
) -> jax.Array:
    """Return ``f((x · input_scale) @ ((codes − zeros) · scales · factor) + bias)``.

    The scaled input keeps the dtype of ``x``. With an ``x_scale`` it is then rounded to
    ``rounded`` in those units.

    Args:
        x: ``[M, K]``.
        codes: elements ``[K', N]``, K' ≥ K, or a stack.
        scales: ``[groups, N]``, or a stack.
        zeros: like ``scales``, or None.
        layer: which of the stack.
        group: rows per scale.
        factor: of all weights.
        bias: ``[N]``.
        input_scale: ``[K]``.
        epilogue: an activation function's name.
        x_scale: ``[M, 1]``.
        rounded: ``"int8"`` or a float8 dtype.

    Returns:
        float32 ``[M, N]``.
    """
    if layer is not None:
        codes, scales = codes[layer], scales[layer]
        zeros = None if zeros is None else zeros[layer]
    dtype, x = jnp.asarray(x).dtype, jnp.asarray(x).astype(jnp.float32)
    if input_scale is not None:
        x = (x * input_scale).astype(dtype).astype(jnp.float32)
    if x_scale is not None:
        x = rounded_to(x / x_scale, rounded) * x_scale
    inner, columns = codes.shape

    def per_row(a: jax.Array) -> jax.Array:
        wide = jnp.repeat(a.astype(jnp.float32), group, axis=0)[:inner]
        return jnp.broadcast_to(wide, (inner, columns))

    w = codes.astype(jnp.float32)
    w = w if zeros is None else w - per_row(zeros)
    w = w * per_row(scales) * factor
    x = jnp.pad(x, ((0, 0), (0, inner - x.shape[1])))
    y = jnp.matmul(x, w, precision="highest")
    return activation(epilogue)(y if bias is None else y + bias)


def rounded_to(x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Return float32 ``x`` rounded to ``dtype``, saturating."""
    if dtype is None:
        return x
    if jnp.issubdtype(dtype, jnp.integer):
        most = jnp.iinfo(dtype).max
        return jnp.clip(jnp.round(x), -most, most)
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype).astype(jnp.float32)
