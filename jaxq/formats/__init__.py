"""The number formats: how a code maps to a number. One row per format."""

from jaxq.formats.base import Format as Format
from jaxq.formats.codebook import (
    E2M1,
    FP4_BNB,
    NF4,
    CodebookFormat,
    dynamic_map,
)
from jaxq.formats.integer import IntegerFormat as IntegerFormat
from jaxq.formats.minifloat import FourBitFloatFormat, MinifloatFormat

_ROWS: tuple[Format, ...] = (
    *(IntegerFormat(f"int{b}", b, signed=True) for b in range(2, 9)),
    *(IntegerFormat(f"uint{b}", b, signed=False) for b in range(2, 9)),
    MinifloatFormat("fp8_e4m3", 8, "float8_e4m3fn"),
    MinifloatFormat("fp8_e5m2", 8, "float8_e5m2"),
    FourBitFloatFormat("fp4_e2m1", 4, E2M1, ties_to_even=True),
    CodebookFormat("fp4_bnb", 4, FP4_BNB),
    CodebookFormat("nf4", 4, NF4),
    CodebookFormat("dynamic8", 8, dynamic_map(signed=True)),
    CodebookFormat("dynamic8_unsigned", 8, dynamic_map(signed=False)),
)

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
