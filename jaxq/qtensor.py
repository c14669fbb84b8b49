"""`QTensor`: a quantized array that is a pytree of plain arrays."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike

from jaxq.blocks import grid_shape, spread
from jaxq.explicit_axes import explicit_mesh, placed, split
from jaxq.scales import divide, load_scale, rounded
from jaxq.spec import QuantSpec
from pallas_kernels import layouts, table
from pallas_kernels.kernel import Coding

DATA_FIELDS = (
    "codes",
    "scales",
    "zeros",
    "offset",
    "input_scale",
    "input_index",
    "activation_scale",
    "activation_zero",
)
STATIC_FIELDS = (
    "spec",
    "axis",
    "pack",
    "padding",
    "rows",
    "block",
    "dtype",
    "activation",
    "layout",
    "sharding",
    "name",
)


@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """A quantized tensor: ``x ≈ ((code − zero) · scale + offset) · input_scale``.

    With an ``input_index`` the stored matrix has other rows than the one it stands for:
    the product gathers the activation's channels first, ``y = x[..., index] @ stored``,
    so row k of the tensor is the sum of the stored rows whose index is k (a split
    channel, Zhao et al. 2019; or a mere permutation, GPTQ's ``g_idx``).

    Every array has the rank of the tensor it stands for, and the static fields count
    axes from the end. So a leading axis (layers, experts, a batch) can be added or
    taken away by `jax.vmap`, `jax.lax.scan` or indexing, as with any array.

    Attributes:
        codes: uint8, packed along ``axis`` (see `pallas_kernels.layouts`); in a layout
            other than ``"planar"`` what that layout makes of them.
        scales: one per block, in the storage of ``spec.scale``; a `QTensor` when the
            scales are quantized themselves. Binary-coded, as many per block as a code
            has bits, beside each other along ``axis`` (see `jaxq.binary`).
        zeros: integer zero point per block, or None when symmetric.
        offset: float32 added after scaling, one per block or for all, or None.
        input_scale: float32 factor per contracted element, or None; a matrix product
            may apply it to the activation instead of the weight. One per stored row.
        input_index: int32 channel of the activation that meets each stored row: as long
            as ``axis`` there, 1 along the free axis; or None, each row its own.
        activation_scale: float32 static scale for ``activation``, or None (dynamic).
        activation_zero: the zero point that goes with it (int8 or uint8), or None.
        spec: how it was quantized.
        axis: the packed axis, negative; the innermost contracted one.
        pack: rows per packing block along ``axis``.
        padding: rows at the end of ``axis`` that exist in ``codes`` only.
        rows: length of ``axis`` in the tensor it stands for when there is an
            ``input_index``; None without: the stored length.
        block: elements per scale along each trailing axis.
        dtype: the dtype of the tensor it stands for.
        activation: how a matrix product quantizes the other operand, or None.
        layout: how codes are arranged; ``"planar"`` is the canonical one.
        sharding: where the tensor it stands for lies on a mesh, as far as kernels must
            know (see `jaxq.shard_params`); the last two axes count. Not saved.
        name: the parameter's path, for messages; not part of saved files.
    """

    codes: jax.Array
    scales: "jax.Array | QTensor"
    zeros: jax.Array | None = None
    offset: jax.Array | None = None
    input_scale: jax.Array | None = None
    input_index: jax.Array | None = None
    activation_scale: jax.Array | None = None
    activation_zero: jax.Array | None = None
    spec: QuantSpec = dataclasses.field(kw_only=True)
    axis: int = dataclasses.field(kw_only=True)
    pack: int = dataclasses.field(kw_only=True)
    padding: int = dataclasses.field(kw_only=True, default=0)
    rows: int | None = dataclasses.field(kw_only=True, default=None)
    block: tuple[int, ...] = dataclasses.field(kw_only=True)
    dtype: Any = dataclasses.field(kw_only=True)
    activation: QuantSpec | None = dataclasses.field(kw_only=True, default=None)
    layout: str = dataclasses.field(kw_only=True, default="planar")
    sharding: NamedSharding | None = dataclasses.field(kw_only=True, default=None)
    name: str | None = dataclasses.field(kw_only=True, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor it stands for."""
        shape = list(self.stored_shape)
        if self.rows is not None:
            shape[self.axis] = self.rows
        return tuple(shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the codes, unpacked: `shape`, but for an ``input_index``."""
        shape = list(self.codes.shape)
        if self.layout != "planar":
            matrix = table.layout(self.layout).matrix(self.codes.shape, self.coding)
            shape[-2:] = matrix[0] - self.padding, matrix[1]
            return tuple(shape)
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
        return sum(math.prod(a.shape) * _bits(a.dtype) for a in leaves) // 8

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, everything included."""
        return self.nbytes * 8 / max(self.size, 1)

    @property
    def coding(self) -> Coding:
        """What a kernel must know of the codes."""
        return self.spec.number_format.coding(self.pack)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The block size along every axis (1 along added leading axes)."""
        missing = self.ndim - len(self.block)
        return (1,) * missing + self.block[max(-missing, 0) :]

    @property
    def scale_grid(self) -> tuple[int, ...]:
        """How many scales lie along each axis, unless all along it share one."""
        grid = list(grid_shape(self.stored_shape, self.blocks))
        if self.spec.binary:
            grid[self.axis] *= self.spec.bits
        return tuple(grid)

    def scale_values(self) -> jax.Array:
        """Return the scales as float32, one per block."""
        if isinstance(self.scales, QTensor):
            return self.scales.dequantize(jnp.float32)
        assert isinstance(self.spec.scale, str)
        return load_scale(self.scales, self.spec.scale)

    def code_values(self) -> jax.Array:
        """Return the codes as float32 numbers in code units, unpacked, unpadded."""
        bits, codes = self.spec.bits, self.codes
        if self.layout != "planar":
            codes = table.layout(self.layout).unpack(codes, self.coding)
        codes = layouts.unpack(codes, bits, self.axis % self.ndim, self.pack)
        if self.padding:
            length = self.stored_shape[self.axis]
            codes = jax.lax.slice_in_dim(codes, 0, length, axis=self.axis % self.ndim)
        return self.spec.number_format.decode(codes)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the float array ``((code − zero) · scale + offset) · input_scale``.

        With an ``input_index``, stored rows of one channel are added up.

        Args:
            dtype: of the result; by default the dtype of the original tensor. The
                arithmetic is float32.
        """
        dtype = self.dtype if dtype is None else dtype
        mesh = explicit_mesh(self)
        if mesh is None:
            return self._values(dtype)
        entries = split(self.codes, mesh)
        if self.layout != "planar" or self.padding or self.rows is not None:
            entries = ()
        lies = NamedSharding(mesh, PartitionSpec(*entries))
        return placed(lambda q: q._values(dtype), lies, self)

    def _values(self, dtype: DTypeLike) -> jax.Array:
        """Return what `dequantize` does, where no type says how arrays lie."""
        values, shape = self._scaled_values(), self.stored_shape
        if self.offset is not None:
            offset = spread(self.offset, self.blocks, shape)
            values = rounded(values) + offset
        if self.input_scale is not None:
            values = values * self.input_scale
        if self.input_index is not None:
            values = _sum_rows(values, self.input_index, self.axis, self.shape)
        return values.astype(dtype)

    def _scaled_values(self) -> jax.Array:
        """Return ``(code − zero) · scale``, or the sum of scaled signs, float32."""
        values, shape = self.code_values(), self.stored_shape
        if self.spec.binary:
            return self._signed_sum(values.astype(jnp.uint8))
        if self.zeros is not None:
            zeros = self.zeros.astype(jnp.float32)
            values = values - spread(zeros, self.blocks, shape)
        scales = self.scales
        if self.spec.scale == "inverse_float32" and not isinstance(scales, QTensor):
            return divide(values, spread(scales, self.blocks, shape))
        return values * spread(self.scale_values(), self.blocks, shape)

    def _signed_sum(self, codes: jax.Array) -> jax.Array:
        """Return ``Σ_i ± scale_i``, the sign as bit i of a code says."""
        scales, axis = self.scale_values(), self.axis % self.ndim
        total = jnp.zeros(codes.shape, jnp.float32)
        for i in range(self.spec.bits):
            plane = jax.lax.slice_in_dim(scales, i, None, self.spec.bits, axis)
            plane = spread(plane, self.blocks, self.stored_shape)
            total = total + jnp.where(codes & (1 << i) != 0, plane, -plane)
        return total

    def __repr__(self) -> str:
        """Say shape, dtype, format, bits and bytes in one line."""
        if not hasattr(self.codes, "shape"):
            return f"QTensor({self.codes!r})"
        shape = "x".join(map(str, self.shape)) or "scalar"
        act = "" if self.activation is None else f", {self.activation.describe()} input"
        stored = self.stored_shape[self.axis]
        picks = "" if self.rows is None else f", {stored} rows stored"
        return (
            f"QTensor({shape} {jnp.dtype(self.dtype).name} as {self.spec.describe()}"
            f"{picks}{act}; {self.bits_per_weight:.3f} bits/weight, "
            f"{self.nbytes:,} bytes)"
        )


register_dataclass(QTensor, DATA_FIELDS, STATIC_FIELDS)


def _bits(dtype: Any) -> int:
    """Return the bits of an array's element: int4 takes half a byte."""
    dtype = jnp.dtype(dtype)
    return 4 if dtype.name in ("int4", "uint4") else dtype.itemsize * 8


def _sum_rows(
    values: jax.Array, index: jax.Array, axis: int, shape: tuple[int, ...]
) -> jax.Array:
    """Return ``out[k] = Σ values[i]`` over the rows i along ``axis`` with index k.

    Args:
        values: the stored tensor.
        index: of the same rank; 1 along an axis means the same rows everywhere.
        axis: negative.
        shape: of the result.
    """
    packed = axis % index.ndim
    own = (i for i, n in enumerate(index.shape) if n > 1 and i != packed)
    if (i := next(own, None)) is not None:
        rest, inner = shape[:i] + shape[i + 1 :], axis + (i > packed)
        one = functools.partial(_sum_rows, axis=inner, shape=rest)
        return jax.vmap(one, (i, i), i)(values, index)
    rows = jnp.moveaxis(values, axis, 0)
    total = jnp.zeros((shape[axis], *rows.shape[1:]), values.dtype)
    return jnp.moveaxis(total.at[index.reshape(-1)].add(rows), 0, axis)


def is_qtensor(leaf: object) -> bool:
    """Whether ``leaf`` is a `QTensor`; the ``is_leaf`` of tree functions."""
    return isinstance(leaf, QTensor)
