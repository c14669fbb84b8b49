"""`QuantSpec`: how one tensor is quantized, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxq.formats import FORMATS, Format
from jaxq.names import lookup, unknown

Block = str | int | tuple[int, int]

BLOCKS = ("tensor", "channel", "token")
GRIDS = ("restricted", "gptq", "full")
EXPONENTS = ("floor", "near", "ceil")
SCALE_DTYPES = (
    *("float32", "bfloat16", "float16"),
    *("e4m3", "e8m0", "inverse_float32"),
)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized: ``x ≈ (code − zero) · scale``.

    Attributes:
        format: a key of `jaxq.formats.FORMATS`, for example ``"int4"`` or ``"nf4"``.
        block: what shares one scale: the whole ``"tensor"``; a ``"channel"`` (all the
            contracted elements of one output) or ``"token"`` (the same thing, of an
            activation: one row); a group of that many elements along the contraction
            (an int); or a tile ``(contracted, free)`` of a matrix.
        symmetric: whether the zero point is 0. Asymmetric needs an integer format.
        grid: which symmetric integer grid, for b bits and the largest magnitude a:
            ``"restricted"`` (scale ``a / (2^(b-1)-1)``, the code ``-2^(b-1)`` unused),
            ``"gptq"`` (scale ``2a / (2^b-1)``, all codes, both ends clipped a little),
            ``"full"`` (signed scale: the extreme itself is the code ``-2^(b-1)``).
        scale: the dtype scales are stored in, one of ``float32 bfloat16 float16 e4m3
            e8m0 inverse_float32`` (e8m0: a power of two, see ``exponent``;
            inverse_float32: its reciprocal, by which codes are divided), or a
            `QuantSpec` by which the scales are quantized in turn (double quantization).
        exponent: which power of two an e8m0 scale is, for the largest magnitude a and
            the largest code h: ``"floor"`` (``2^(⌊log2 a⌋ − ⌊log2 h⌋)``, as OCP
            Microscaling v1.0 has it), ``"near"`` (the same, one more where a is at
            least 1.75 times a power of two: compressed-tensors), ``"ceil"`` (the
            smallest by which nothing saturates, ``2^⌈log2(a / h)⌉``: torchao's RCEIL).
        outliers: of an activation only, and only int8 per token: the magnitude from
            which a number counts as an outlier. A column of the activation that holds
            any is multiplied in floats, the others in integers (LLM.int8(), Dettmers
            et al. 2022, where it is 6). None: everything in integers.
        center: whether the mean is subtracted first and stored as an offset; used for
            double-quantized scales, as QLoRA does.
        binary: whether every bit of a code has a scale of its own, and stands for plus
            or minus it: ``x ≈ Σ_i α_i · (±1)``, and an offset per block unless
            ``symmetric`` (binary coding, see `jaxq.binary`). Of unsigned integers of 2
            to 7 bits, in groups or per channel.

    Raises:
        ValueError: naming the field, its value and what it may be.

    Example:
        >>> QuantSpec("uint4", block=64, symmetric=False, scale="bfloat16").describe()
        'uint4 g64 asymmetric, bfloat16 scales'
    """

    format: str
    block: Block = "channel"
    symmetric: bool = True
    grid: str = "restricted"
    scale: "str | QuantSpec" = "float32"
    center: bool = False
    outliers: float | None = None
    binary: bool = False
    exponent: str = "floor"

    def __post_init__(self) -> None:
        """Reject what no quantizer could honour."""
        fmt = lookup(FORMATS, self.format, "format")
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        _check_block(self.block)
        if self.grid not in GRIDS:
            raise unknown(self.grid, GRIDS, "symmetric grid")
        _check_scale(self.scale)
        if self.scale == "e8m0" and not (self.symmetric and self.grid == "restricted"):
            raise ValueError(
                f"scale='e8m0' is a power of two for the symmetric, restricted grid, "
                f"but symmetric={self.symmetric} and grid={self.grid!r}: use another "
                f"scale dtype, or the defaults"
            )
        if self.exponent not in EXPONENTS:
            raise unknown(self.exponent, EXPONENTS, "exponent")
        if self.exponent != "floor" and self.scale != "e8m0":
            raise ValueError(
                f"exponent={self.exponent!r} is a choice for power-of-two scales, but "
                f"scale={self.scale!r}: use scale='e8m0', or leave exponent='floor'"
            )
        if not self.symmetric and not fmt.is_integer:
            raise ValueError(
                f"symmetric=False needs an integer format, and {self.format!r} is not "
                f"one: use 'uint{fmt.bits}', or leave symmetric=True"
            )
        if self.grid != "restricted" and not (fmt.is_integer and fmt.lowest < 0):
            raise ValueError(
                f"grid={self.grid!r} is a choice for signed integers, but the format "
                f"is {self.format!r}: leave grid='restricted'"
            )
        if self.binary:
            _check_binary(self)
        if self.outliers is not None:
            object.__setattr__(self, "outliers", _checked_outliers(self))

    @property
    def number_format(self) -> Format:
        """The `Format` that `format` names."""
        return FORMATS[self.format]

    @property
    def bits(self) -> int:
        """Bits per code, without scales."""
        return self.number_format.bits

    @property
    def code_range(self) -> tuple[float, float]:
        """The smallest and largest number that a code may take under this spec."""
        fmt = self.number_format
        if self.symmetric and fmt.is_integer and self.grid == "restricted":
            return max(fmt.lowest, -fmt.highest), fmt.highest
        return fmt.lowest, fmt.highest

    @property
    def static_number(self) -> bool:
        """Whether one number found beforehand says what dynamic scales need not.

        The scale of the whole tensor; or, where the blocks' scales are dynamic and
        quantized in turn (nvfp4), the scale of those.
        """
        if not isinstance(self.scale, QuantSpec):
            return self.block == "tensor"
        inner = self.scale
        plain = inner.symmetric and not inner.center and inner.block == "tensor"
        wide = inner.scale in ("float32", "inverse_float32")
        return plain and wide and self.symmetric and not self.center

    def describe(self) -> str:
        """Return one line for tables: format, block, symmetry, scales."""
        block = f"g{self.block}" if isinstance(self.block, int) else self.block
        if isinstance(block, tuple):
            block = f"tile {block[0]}x{block[1]}"
        kind = "" if self.symmetric else " asymmetric"
        grid = "" if self.grid == "restricted" else f" ({self.grid} grid)"
        if isinstance(self.scale, str):
            rounded = "" if self.exponent == "floor" else f" ({self.exponent})"
            scales = f"{self.scale}{rounded} scales"
        else:
            scales = f"scales as {self.scale.describe()}"
        kept = "" if self.outliers is None else f", outliers from {self.outliers:g}"
        coding = " binary-coded" if self.binary else ""
        return f"{self.format}{coding} {block}{kind}{grid}, {scales}{kept}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as plain data."""
        out: dict[str, Any] = {"format": self.format}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, QuantSpec):
                value = value.to_dict()
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantSpec":
        """Invert `to_dict`.

        Raises:
            ValueError: on an unknown key, or a value the constructor refuses.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise unknown(key, known, "QuantSpec field")
        fields = dict(data)
        if isinstance(fields.get("scale"), Mapping):
            fields["scale"] = cls.from_dict(fields["scale"])
        return cls(**fields)


def _checked_outliers(spec: QuantSpec) -> float:
    """Return the threshold of a spec that may have one, as a float."""
    limit = spec.outliers
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not number or not 0 < limit < float("inf"):
        raise ValueError(
            f"outliers={limit!r} must be a positive number, the magnitude from which a "
            f"column stays float (6.0 is usual), or None"
        )
    plain = spec.symmetric and spec.grid == "restricted" and not spec.center
    if spec.format != "int8" or spec.block != "token" or not plain:
        raise ValueError(
            f"outliers={limit:g} is for an activation in int8, symmetric, with one "
            f"scale per token, but the spec has format={spec.format!r}, "
            f"block={spec.block!r}, symmetric={spec.symmetric}, grid={spec.grid!r}, "
            f"center={spec.center}: use QuantSpec('int8', 'token', outliers={limit:g})"
        )
    return float(limit)


def _check_binary(spec: QuantSpec) -> None:
    """Raise unless a binary-coded spec is one that signs can be chosen for."""
    fmt = spec.number_format
    unsigned = fmt.is_integer and fmt.lowest == 0 and fmt.bits < 8
    grouped = isinstance(spec.block, int) or spec.block == "channel"
    plain = spec.scale in ("float32", "bfloat16", "float16")
    if not (unsigned and grouped and plain) or spec.center or spec.outliers is not None:
        raise ValueError(
            f"binary=True is for uint2 to uint7, in groups or per channel, with scales "
            f"in float32, bfloat16 or float16, but the spec has format="
            f"{spec.format!r}, block={spec.block!r}, scale={spec.scale!r}, "
            f"center={spec.center}, outliers={spec.outliers}"
        )


def _check_block(block: Block) -> None:
    """Raise unless ``block`` is one of the five granularities."""
    if isinstance(block, str):
        if block not in BLOCKS:
            raise unknown(block, BLOCKS, "block")
        return
    tile = isinstance(block, tuple)
    sizes = block if tile else (block,)
    wrong = tile and len(block) != 2
    if wrong or not all(type(n) is int and n >= 1 for n in sizes):
        raise ValueError(
            f"block={block!r}: give 'tensor', 'channel', 'token', a group size >= 1, "
            f"or a tile (contracted, free) of two sizes >= 1"
        )


def _check_scale(scale: "str | QuantSpec") -> None:
    """Raise unless ``scale`` is a scale dtype or a spec."""
    if isinstance(scale, QuantSpec):
        return
    if not isinstance(scale, str):
        raise ValueError(
            f"scale={scale!r}: give one of {', '.join(SCALE_DTYPES)}, or a QuantSpec "
            f"by which the scales are quantized"
        )
    if scale not in SCALE_DTYPES:
        raise unknown(scale, SCALE_DTYPES, "scale dtype")
