"""How a torchao layer rounds its input, from the schema in a file's metadata."""

from collections.abc import Mapping
from typing import Any

from jaxq.codecs.floats import small_scales
from jaxq.spec import QuantSpec

# of mx: the format and the mode there -> `QuantSpec.exponent`
EXPONENTS = {
    ("fp8_e4m3", "FLOOR"): "floor",
    ("fp8_e4m3", "RCEIL"): "ceil",
    ("fp4_e2m1", "FLOOR"): "floor",
    ("fp4_e2m1", "RCEIL"): "ceil",
    ("fp4_e2m1", "EVEN"): "near",
}
FORMATS = {"float8_e4m3fn": "fp8_e4m3", "float4_e2m1fn_x2": "fp4_e2m1"}
BLOCKS = {"PerRow": "token", "PerTensor": "tensor"}


def activation(data: Mapping[str, Any], static: bool) -> QuantSpec | None:
    """Return how a product is to quantize its input; None where none can.

    Args:
        data: the settings of a weight's tensor class.
        static: whether the file has the scale of the scales of an nvfp4 input.
    """
    if data.get("activation_quantization") == "int8_asym_per_token":
        return QuantSpec("int8", "token", symmetric=False)
    kind, settings = _class(data.get("act_quant_kwargs"))
    if kind == "QuantizeTensorToMXKwargs":
        return _mx(settings)
    if kind == "QuantizeTensorToNVFP4Kwargs":
        dynamic = settings.get("use_dynamic_per_tensor_scale") is True
        plain = settings.get("block_size") == 16 and dynamic != static
        two = QuantSpec("fp4_e2m1", 16, scale=small_scales(divides=False))
        return two if plain else None
    block = BLOCKS.get(_class(settings.get("granularity"))[0])
    if kind == "QuantizeTensorToFloat8Kwargs":
        bounded = [settings.get(f"hp_value_{end}") for end in ("lb", "ub")]
        plain = _word(settings.get("float8_dtype")) == "float8_e4m3fn"
        fits = block is not None and plain and bounded == [None, None]
        return QuantSpec("fp8_e4m3", str(block)) if fits else None
    if kind == "QuantizeTensorToInt8Kwargs":
        mapping = _word(settings.get("mapping_type"))
        fits = block is not None and mapping == "SYMMETRIC"
        fits = fits and not settings.get("reduce_range")
        return QuantSpec("int8", str(block), grid="gptq") if fits else None
    return None


def _mx(settings: Mapping[str, Any]) -> QuantSpec | None:
    name = FORMATS.get(_word(settings.get("elem_dtype")))
    if name is None or settings.get("block_size") != 32:
        return None
    exponent = EXPONENTS.get((name, _word(settings.get("scaling_mode"))))
    if exponent is None:
        return None
    return QuantSpec(name, 32, scale="e8m0", exponent=exponent)


def _class(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the fields of an object; empty where it is none."""
    if not isinstance(value, dict):
        return "", {}
    fields = value.get("_data")
    return str(value.get("_type")), fields if isinstance(fields, dict) else {}


def _word(value: Any) -> str:
    """Return the value of an enumeration or the name of a dtype."""
    word = value.get("_data") if isinstance(value, dict) else value
    return str(word).removeprefix("torch.")
