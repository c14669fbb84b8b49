"""The table of formats: one row each."""

from collections.abc import Mapping
from typing import Any

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import (
    autoround,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    hqq,
    modelopt,
    torchao,
)
from jaxq.codecs.autoround_write import AutoRoundWriter
from jaxq.codecs.awq_write import AWQWriter
from jaxq.codecs.base import Codec
from jaxq.codecs.bitsandbytes_write import BitsAndBytesWriter
from jaxq.codecs.compressed_tensors_write import CompressedTensorsWriter
from jaxq.codecs.fp8_write import FP8Writer
from jaxq.codecs.gptq_write import GPTQWriter

CODECS: dict[str, Codec] = {
    row.name: row
    for row in (
        Codec("gptq", ("gptq",), gptq.read, GPTQWriter),
        Codec("awq", ("awq",), awq.read, AWQWriter),
        Codec(
            "compressed-tensors",
            ("compressed-tensors", "compressed_tensors"),
            compressed_tensors.read,
            CompressedTensorsWriter,
        ),
        Codec("bitsandbytes", ("bitsandbytes",), bitsandbytes.read, BitsAndBytesWriter),
        Codec("fp8", ("fp8",), fp8.read, FP8Writer),
        Codec("modelopt", ("modelopt", "modelopt_fp4"), modelopt.read),
        Codec("torchao", ("torchao",), torchao.read),
        Codec("hqq", ("hqq",), hqq.read),
        Codec(
            "auto-round",
            ("auto-round", "intel/auto-round"),
            autoround.read,
            AutoRoundWriter,
        ),
    )
}


def codec_of(config: Mapping[str, Any]) -> Codec:
    """Return the codec that a ``quantization_config`` names.

    Raises:
        CheckpointError: it names none.
        UnsupportedError: it names one that is not known; says which are.
    """
    method = config.get("quant_method")
    if not isinstance(method, str):
        raise CheckpointError(
            f"quantization_config: 'quant_method' is {shorten(method)}; it must name "
            f"the format: {', '.join(CODECS)}"
        )
    for codec in CODECS.values():
        if method.lower() in codec.methods:
            return codec
    raise UnsupportedError(
        f"quantization_config: quant_method {shorten(method)} is not known; known are "
        f"{', '.join(CODECS)}"
    )
