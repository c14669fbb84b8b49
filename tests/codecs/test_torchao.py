"""torchao's tensors, which it writes itself: the inputs of their products."""

import jax
import numpy as np
import pytest

from jaxq.codecs.source import SafetensorsSource
from jaxq.codecs.torchao import TorchAOReader
from jaxq.ops.activation import quantized_input
from jaxq.spec import QuantSpec
from tests.codecs.excerpts import load

SCALES = QuantSpec("fp8_e4m3", "tensor")


def test_the_input_of_mxfp8_is_rounded_as_the_file_says():
    excerpt = load("torchao-mxfp8")
    for weight, about in excerpt.weights.items():
        module, shape = weight.removesuffix(".weight"), tuple(about["shape"])
        found = excerpt.reader.read(module, shape)
        spec = QuantSpec("fp8_e4m3", 32, scale="e8m0", exponent="ceil")
        assert (found.activation, found.note) == (spec, "")


def _mx(weight, dtype, mode):
    from torchao.prototype.mx_formats.mx_tensor import (
        MXTensor,
        QuantizeTensorToMXKwargs,
        ScaleCalculationMode,
    )

    mode = getattr(ScaleCalculationMode, mode)
    kwargs = QuantizeTensorToMXKwargs(elem_dtype=dtype, scaling_mode=mode)
    tensor = MXTensor.to_mx(weight, dtype, act_quant_kwargs=kwargs)
    return tensor, lambda x: MXTensor.to_mx(x, dtype, 32, mode).dequantize()


def _nvfp4(weight, static):
    import torch
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4

    kwargs = nvfp4.QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=not static)
    number = torch.tensor(0.001) if static else None
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(
        weight, act_per_tensor_scale=number, act_quant_kwargs=kwargs
    )

    def rounded(x):
        world = number
        if world is None:
            world = nvfp4.per_tensor_amax_to_scale(x.abs().max())
        made = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=world)
        return made.dequantize(torch.float32)

    return tensor, rounded


def _float8(weight):
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor as float8

    kwargs = float8.QuantizeTensorToFloat8Kwargs(granularity=PerRow())
    make = float8.Float8Tensor.from_hp
    tensor = make(weight, granularity=PerRow(), act_quant_kwargs=kwargs)
    return tensor, lambda x: make(x, granularity=PerRow()).dequantize()


def _int8(weight):
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8 import int8_tensor as int8

    kwargs = int8.QuantizeTensorToInt8Kwargs(granularity=PerRow())
    make = int8.Int8Tensor.from_hp
    tensor = make(weight, granularity=PerRow(), act_quant_kwargs=kwargs)
    return tensor, lambda x: make(x, granularity=PerRow()).dequantize()


MADE = {
    "mxfp8 rceil": (lambda t, w: _mx(w, t.float8_e4m3fn, "RCEIL"), "ceil"),
    "mxfp8 floor": (lambda t, w: _mx(w, t.float8_e4m3fn, "FLOOR"), "floor"),
    "mxfp4 even": (lambda t, w: _mx(w, t.float4_e2m1fn_x2, "EVEN"), "near"),
    "nvfp4": (lambda t, w: _nvfp4(w, static=False), SCALES),
    "nvfp4 static": (lambda t, w: _nvfp4(w, static=True), SCALES),
    "float8": (lambda t, w: _float8(w), "token"),
    "int8": (lambda t, w: _int8(w), "token"),
}


@pytest.mark.compare
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", MADE)
def test_inputs_are_rounded_as_torchao_does(tmp_path, form):
    import torch
    from safetensors.torch import save_file
    from torchao.prototype.safetensors import safetensors_support as support

    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.standard_normal((48, 128)).astype(np.float32))
    make, named = MADE[form]
    tensor, rounded = make(torch, weight.bfloat16())
    parts, metadata = support.flatten_tensor_state_dict({"up.weight": tensor})
    save_file(parts, tmp_path / "model.safetensors", metadata)
    source = SafetensorsSource.of(tmp_path)
    found = TorchAOReader(source, source.metadata).read("up", (48, 128))
    assert not found.note
    assert found.activation is not None
    spec = found.activation
    assert named in (spec.exponent, spec.scale, spec.block)
    x = rng.standard_normal((14, 128)) * rng.uniform(0.1, 3, (14, 1))
    x = x.astype(np.float32)
    ours = np.asarray(jax.jit(quantized_input)(x, found.tensor()))
    theirs = rounded(torch.tensor(x)).float().numpy()
    # they multiply by reciprocals: to the bit but for that, and for int8's codes half
    # way between two
    differ = ~np.isclose(ours, theirs, rtol=3e-7, atol=0)
    assert differ.sum() <= (14 if spec.format == "int8" else 0)  # one of a token
    np.testing.assert_allclose(ours, theirs, atol=np.abs(x).max() / 127)
    assert np.abs(ours - x).max() > 0.01
