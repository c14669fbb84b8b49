"""`QTensor`: a quantized array that is a pytree of plain arrays."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike

from jaxq.blocks import spread
from jaxq.scales import load_scale, rounded
from jaxq.spec import QuantSpec
from pallas_kernels import layouts

DATA_FIELDS = (
    "codes",
    "scales",
    "zeros",
    "offset",
    "input_scale",
    "activation_scale",
)
STATIC_FIELDS = (
    "spec",
    "axis",
    "pack",
    "padding",
    "block",
    "dtype",
    "activation",
    "layout",
    "name",
)


@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """A quantized tensor: ``x ≈ ((code − zero) · scale + offset) · input_scale``.

    Every array has the rank of the tensor it stands for, and the static fields count
    axes from the end. So a leading axis (layers, experts, a batch) can be added or
    taken away by `jax.vmap`, `jax.lax.scan` or indexing, as with any array.

    Attributes:
        codes: uint8, packed along ``axis`` (see `pallas_kernels.layouts`).
        scales: one per block, in the storage of ``spec.scale``; a `QTensor` when the
            scales are quantized themselves.
        zeros: integer zero point per block, or None when symmetric.
        offset: float32 added after scaling, or None.
        input_scale: float32 factor per contracted element, or None; a matrix product
            may apply it to the activation instead of the weight.
        activation_scale: float32 static scale for ``activation``, or None (dynamic).
        spec: how it was quantized.
        axis: the packed axis, negative; the innermost contracted one.
        pack: rows per packing block along ``axis``.
        padding: rows at the end of ``axis`` that exist in ``codes`` only.
        block: elements per scale along each trailing axis.
        dtype: the dtype of the tensor it stands for.
        activation: how a matrix product quantizes the other operand, or None.
        layout: how codes are arranged; ``"planar"`` is the canonical one.
        name: the parameter's path, for messages; not part of saved files.
    """

    codes: jax.Array
    scales: "jax.Array | QTensor"
    zeros: jax.Array | None = None
    offset: jax.Array | None = None
    input_scale: jax.Array | None = None
    activation_scale: jax.Array | None = None
    spec: QuantSpec = dataclasses.field(kw_only=True)
    axis: int = dataclasses.field(kw_only=True)
    pack: int = dataclasses.field(kw_only=True)
    padding: int = dataclasses.field(kw_only=True, default=0)
    block: tuple[int, ...] = dataclasses.field(kw_only=True)
    dtype: Any = dataclasses.field(kw_only=True)
    activation: QuantSpec | None = dataclasses.field(kw_only=True, default=None)
    layout: str = dataclasses.field(kw_only=True, default="planar")
    name: str | None = dataclasses.field(kw_only=True, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor it stands for."""
        shape = list(self.codes.shape)
        shape[self.axis] = shape[self.axis] * 8 // self.spec.bits - self.padding
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """The number of elements it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales, zero points and everything else."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in leaves)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, everything included."""
        return self.nbytes * 8 / max(self.size, 1)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block size along every axis (1 along added leading axes)."""
        missing = self.ndim - len(self.block)
        return (1,) * missing + self.block[max(-missing, 0) :]

    def scale_values(self) -> jax.Array:
        """Return the scales as float32, one per block."""
        if isinstance(self.scales, QTensor):
            return self.scales.dequantize(jnp.float32)
        assert isinstance(self.spec.scale, str)
        return load_scale(self.scales, self.spec.scale)

    def code_values(self) -> jax.Array:
        """Return the codes as float32 numbers in code units, unpacked, unpadded."""
        bits = self.spec.bits
        codes = layouts.unpack(self.codes, bits, self.axis % self.ndim, self.pack)
        if self.padding:
            length = codes.shape[self.axis] - self.padding
            codes = jax.lax.slice_in_dim(codes, 0, length, axis=self.axis % self.ndim)
        return self.spec.number_format.decode(codes)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the float array ``((code − zero) · scale + offset) · input_scale``.

        Args:
            dtype: of the result; by default the dtype of the original tensor. The
                arithmetic is float32.
        """
        values = self.code_values()
        if self.zeros is not None:
            zeros = self.zeros.astype(jnp.float32)
            values = values - spread(zeros, self.blocks, self.shape)
        values = values * spread(self.scale_values(), self.blocks, self.shape)
        if self.offset is not None:
            values = rounded(values) + self.offset
        if self.input_scale is not None:
            values = values * self.input_scale
        return values.astype(self.dtype if dtype is None else dtype)

    def __repr__(self) -> str:
        """Say shape, dtype, format, bits and bytes in one line."""
        if not hasattr(self.codes, "shape"):
            return f"QTensor({self.codes!r})"
        shape = "x".join(map(str, self.shape)) or "scalar"
        act = "" if self.activation is None else f", {self.activation.describe()} input"
        return (
            f"QTensor({shape} {jnp.dtype(self.dtype).name} as {self.spec.describe()}"
            f"{act}; {self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )


register_dataclass(QTensor, DATA_FIELDS, STATIC_FIELDS)


def is_qtensor(leaf: object) -> bool:
    """Whether ``leaf`` is a `QTensor`; the ``is_leaf`` of tree functions."""
    return isinstance(leaf, QTensor)
