"""The products that tests and benchmarks share, and what they should be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import layouts
from pallas_kernels.gpu.layout import fields_of, prepack
from pallas_kernels.kernel import Coding, Operands, Problem
from pallas_kernels.reference import matmul

INT8 = Coding("integer", 8, 1, -128)
UINT8 = Coding("integer", 8, 1)
FP8 = Coding("float8_e4m3fn", 8, 1)
NF4 = Coding("table", 4, 32, table=(
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.2844414, -0.18477343, -0.09105,
    0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.440709829, 0.562617, 0.722957,
    1.0,
))  # fmt: skip
FP4 = Coding("table", 4, 32, table=(
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
))  # fmt: skip

# like dynamic8: both signs, and most numbers near zero
TABLE8 = Coding("table", 8, 1, table=tuple(
    float(np.sinh(v / 20) / np.sinh(6.4)) for v in range(-128, 128)
))  # fmt: skip


def signed(bits: int, pack: int = 32) -> Coding:
    """Return the coding of signed integers below 8 bits."""
    return Coding("integer", bits, pack, -(2 ** (bits - 1)))


def unsigned(bits: int, pack: int = 32) -> Coding:
    """Return the coding of unsigned integers below 8 bits."""
    return Coding("integer", bits, pack)


@dataclasses.dataclass(frozen=True)
class Case:
    """A product.

    Attributes:
        name: what is special about it.
        rows: M.
        inner: K.
        columns: N.
        coding: of the weight.
        group: rows per scale, or None for one per column.
        zeros: whether there are zero points.
        layers: stacked weights, or None.
        dtype: of the activation.
        activation: what it is rounded to, or None.
        out_dtype: of the result; that of the activation by default.
        bias: whether there is one.
        scaled: whether there is an input scale.
        epilogue: a key of `pallas_kernels.epilogue.ACTIVATIONS`.
    """

    name: str
    rows: int
    inner: int
    columns: int
    coding: Coding
    group: int | None = None
    zeros: bool = False
    layers: int | None = None
    dtype: str = "bfloat16"
    activation: str | None = None
    out_dtype: str | None = None
    bias: bool = False
    scaled: bool = False
    epilogue: str | None = None

    @property
    def problem(self) -> Problem:
        """Its facts."""
        return Problem(
            rows=self.rows,
            inner=self.inner,
            columns=self.columns,
            dtype=self.dtype,
            out_dtype=self.out_dtype or self.dtype,
            coding=self.coding,
            group=self.group or self.inner,
            zeros=self.zeros,
            activation=self.activation,
            layers=self.layers,
        )

    def options(self, seed: int = 0) -> dict[str, Any]:
        """Return the options of the kernel's function that the case asks for."""
        random = np.random.default_rng(seed + 1)
        bias = random.standard_normal(self.columns).astype(np.float32)
        scale = random.uniform(0.5, 2, self.inner).astype(np.float32)
        given = {
            "bias": jnp.asarray(bias) if self.bias else None,
            "input_scale": jnp.asarray(scale) if self.scaled else None,
            "epilogue": self.epilogue,
        }
        return {name: value for name, value in given.items() if value is not None}

    def operands(self, seed: int = 0) -> Operands:
        """Return random arrays."""
        random = np.random.default_rng(seed)
        lead = () if self.layers is None else (self.layers,)
        shape = (*lead, -(-self.inner // (self.group or self.inner)), self.columns)
        x = random.standard_normal((self.rows, self.inner)).astype(self.dtype)
        scales = random.uniform(0.005, 0.02, shape).astype(np.float32)
        low, high = self.coding.lowest, self.coding.lowest + 2**self.coding.bits - 1
        dtype = np.int8 if low else np.uint8
        zeros = random.integers(low, high + 1, shape).astype(dtype)
        most = {"int8": 127.0, "float8_e4m3fn": 448.0}.get(self.activation or "", 1.0)
        scaled = x.astype(np.float32) * self.options(seed).get("input_scale", 1.0)
        x_scale = np.max(np.abs(scaled), 1, keepdims=True) / most
        return Operands(
            x=jnp.asarray(x),
            codes=self._codes(random, lead),
            scales=jnp.asarray(scales),
            zeros=jnp.asarray(zeros) if self.zeros else None,
            x_scale=jnp.asarray(x_scale) if self.activation else None,
            layer=None if self.layers is None else jnp.int32(self.layers - 1),
        )

    def _codes(self, random: np.random.Generator, lead: tuple[int, ...]) -> jax.Array:
        bits, shape = self.coding.bits, (*lead, self.inner, self.columns)
        codes = random.integers(0, 2**bits, shape).astype(np.uint8)
        if self.coding.kind == "float8_e4m3fn":
            codes = np.where((codes & 0x7F) == 0x7F, np.uint8(1), codes)  # no NaN
        short = -self.inner % self.coding.pack if bits < 8 else 0
        codes = np.pad(codes, [(0, 0)] * len(lead) + [(0, short), (0, 0)])
        planar = layouts.pack(jnp.asarray(codes), bits, len(lead), self.coding.pack)
        return prepack(planar, self.coding)


# ends of a product: what tests try with every kernel
FINISHES: tuple[dict[str, Any], ...] = (
    {"bias": True},
    {"epilogue": "relu", "scaled": True},
    {"epilogue": "silu", "bias": True},
    {"epilogue": "gelu", "bias": True, "scaled": True},
)


def numbers(codes: jax.Array, coding: Coding, dtype: str) -> jax.Array:
    """Return what relaid codes stand for: float32 ``[..., K, N]``.

    The numbers of a table are rounded to ``dtype``, as every kernel does.
    """
    fields = fields_of(codes, coding)
    if coding.kind == "table":
        table = jnp.asarray(coding.table, jnp.float32).astype(dtype)
        return table.astype(jnp.float32)[fields.astype(jnp.int32)]
    if coding.kind != "integer":
        eighth = lax.bitcast_convert_type(fields, jnp.dtype(coding.kind))
        return eighth.astype(jnp.float32)
    if coding.bits == 8 and coding.lowest == -128:
        return lax.bitcast_convert_type(fields, jnp.int8).astype(jnp.float32)
    return fields.astype(jnp.float32) + jnp.float32(coding.lowest)


def reference(p: Problem, a: Operands, **options: Any) -> jax.Array:
    """Return the product in float32 and plain jnp, with its `Case.options`."""
    zeros = None if a.zeros is None else a.zeros.astype(jnp.int32)
    return matmul(
        a.x,
        numbers(a.codes, p.coding, "float16" if p.dtype == "float16" else "bfloat16")[
            ..., : p.inner, :
        ],
        a.scales,
        zeros,
        a.layer,
        group=p.group,
        x_scale=a.x_scale,
        rounded=p.activation,
        **options,
    )
