import dataclasses
import json

import pytest

from jaxq.formats import FORMATS
from jaxq.names import UnknownNameError
from jaxq.spec import BLOCKS, GRIDS, SCALE_DTYPES, QuantSpec

DOUBLE = QuantSpec("dynamic8", 256, center=True)
SPECS = [
    QuantSpec("int4"),
    QuantSpec("uint4", 64, symmetric=False, scale="bfloat16"),
    QuantSpec("int3", "tensor", grid="gptq"),
    QuantSpec("int8", "token", grid="full", scale="float16"),
    QuantSpec("fp8_e4m3", (128, 128)),
    QuantSpec("fp4_e2m1", 32, scale="e8m0"),
    QuantSpec("fp8_e4m3", 32, scale="e8m0", exponent="near"),
    QuantSpec("nf4", 64, scale=DOUBLE),
    QuantSpec("int8", "token", outliers=6),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_survives_json(spec):
    data = json.loads(json.dumps(spec.to_dict()))
    back = QuantSpec.from_dict(data)
    assert back == spec
    assert hash(back) == hash(spec)


def test_to_dict_says_only_what_differs():
    assert QuantSpec("int4").to_dict() == {"format": "int4"}
    assert QuantSpec("nf4", 64, scale=DOUBLE).to_dict() == {
        "format": "nf4",
        "block": 64,
        "scale": {"format": "dynamic8", "block": 256, "center": True},
    }


def test_a_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec("int4").format = "int8"  # type: ignore[misc]


@pytest.mark.parametrize("name", FORMATS)
def test_bits_and_code_range(name):
    spec, fmt = QuantSpec(name), FORMATS[name]
    assert spec.bits == fmt.bits
    low, high = spec.code_range
    assert high == fmt.highest
    # the restricted grid of signed integers is symmetric, all others use every code
    signed = fmt.is_integer and fmt.lowest < 0
    assert low == (-fmt.highest if signed else fmt.lowest)
    if signed:
        for grid in ("gptq", "full"):
            full = dataclasses.replace(spec, grid=grid)
            assert full.code_range == (fmt.lowest, fmt.highest)


def test_describe():
    lines = [spec.describe() for spec in SPECS]
    assert lines == [
        "int4 channel, float32 scales",
        "uint4 g64 asymmetric, bfloat16 scales",
        "int3 tensor (gptq grid), float32 scales",
        "int8 token (full grid), float16 scales",
        "fp8_e4m3 tile 128x128, float32 scales",
        "fp4_e2m1 g32, e8m0 scales",
        "fp8_e4m3 g32, e8m0 (near) scales",
        "nf4 g64, scales as dynamic8 g256, float32 scales",
        "int8 token, float32 scales, outliers from 6",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int44"}, "unknown format 'int44'; did you mean 'int4'"),
        ({"format": None}, "unknown format None"),
        ({"block": "chanel"}, "unknown block 'chanel'; did you mean 'channel'"),
        ({"grid": "gpqt"}, "unknown symmetric grid 'gpqt'; did you mean 'gptq'"),
        ({"scale": "float31"}, "unknown scale dtype 'float31'; did you mean 'float32'"),
        ({"block": 0}, "block=0: give .* group size >= 1"),
        ({"block": -64}, "block=-64"),
        ({"block": 2.5}, r"block=2\.5"),
        ({"block": True}, "block=True"),
        ({"block": (128,)}, r"block=\(128,\).*tile"),
        ({"block": (128, 0)}, r"block=\(128, 0\)"),
        (
            {"format": "nf4", "symmetric": False},
            "symmetric=False needs an integer format, and 'nf4'.*use 'uint4'",
        ),
        (
            {"format": "uint4", "grid": "full"},
            "grid='full' is a choice for signed integers.*'uint4'.*'restricted'",
        ),
        ({"scale": 16}, "scale=16"),
        (
            {"format": "uint4", "symmetric": False, "scale": "e8m0"},
            "e8m0.*symmetric=False",
        ),
        ({"grid": "gptq", "scale": "e8m0"}, "e8m0.*grid='gptq'"),
        ({"exponent": "cell", "scale": "e8m0"}, "unknown exponent 'cell'.*'ceil'"),
        ({"exponent": "near"}, "exponent='near' is .*scale='float32': use .*'e8m0'"),
        ({"outliers": 0}, "outliers=0 must be a positive number.*6.0 is usual"),
        ({"outliers": float("nan")}, "outliers=nan must be"),
        ({"outliers": float("inf")}, "outliers=inf must be"),
        ({"outliers": "6"}, "outliers='6' must be"),
        ({"outliers": True}, "outliers=True must be"),
        (
            {"outliers": 6},
            r"outliers=6 is for .*'int4'.*use QuantSpec\('int8', 'token', outliers=6\)",
        ),
        ({"format": "int8", "block": "tensor", "outliers": 6}, "block='tensor'"),
        (
            {"format": "int8", "block": "token", "symmetric": False, "outliers": 6.5},
            "outliers=6.5 is for .*symmetric=False",
        ),
    ],
    ids=str,
)
def test_errors_name_the_value_and_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**{"format": "int4", **fields})


def test_a_threshold_is_a_float():
    spec = QuantSpec("int8", "token", outliers=6)
    assert type(spec.outliers) is float
    assert spec.to_dict()["outliers"] == 6.0


def test_an_unknown_key_is_named():
    with pytest.raises(UnknownNameError, match="'blok'; did you mean 'block'"):
        QuantSpec.from_dict({"format": "int4", "blok": 64})


def test_a_list_is_a_tile_after_json():
    assert QuantSpec("fp8_e4m3", [128, 64]).block == (128, 64)


def test_the_literal_choices_are_all_accepted():
    for block in BLOCKS:
        QuantSpec("int4", block)
    for grid in GRIDS:
        QuantSpec("int4", grid=grid)
    for scale in SCALE_DTYPES:
        QuantSpec("int4", scale=scale)
