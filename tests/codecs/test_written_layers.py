"""Writing a layer: read again it is the same, and mostly the same bytes."""

import dataclasses
import re
import types

import numpy as np
import pytest

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.base import Dense
from jaxq.codecs.table import CODECS
from jaxq.codecs.unpacked import Unpacked
from jaxq.lm import load_model
from jaxq.presets import PRESETS
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests.codecs.excerpts import NAMES, load

WRITABLE = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed_tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "fp8_block": "fp8",
    "autoround": "auto-round",
}
# What another packing or spelling stores: same numbers, other bytes.
OTHER_BYTES = {
    "autoround-auto_round_w4g32_asym": "AWQ's layout",
    "autoround-auto_gptq_w4g32_asym": "zero points less one",
    "compressed_tensors-legacy_w3a16_packed": "whole fields in a word",
    "compressed_tensors-legacy_w3a16_naive": "int8 in place of packed words",
    "bitsandbytes-nf4_double_storage_bf16": "bytes called bfloat16",
}
# Layers that the target has no form for, and why.
REFUSED = {
    "compressed_tensors-legacy_w4a16_gptq_actorder_group": "act-order",
}


class Memory:
    """A source of tensors that were just written."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __contains__(self, name):
        return name in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def entry(self, name):
        dtypes = {"int32": "I32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
        dtypes |= {"float32": "F32", "uint8": "U8", "int64": "I64"}
        dtypes |= {"float8_e4m3fn": "F8_E4M3"}
        array = self.tensors[name]
        return dtypes[array.dtype.name], array.shape

    def where(self, name):
        return name

    def read(self, name):
        return self.tensors[name]


def _cases():
    return [n for n in NAMES if n.partition("-")[0] in WRITABLE]


def _layers(name, excerpt):
    for weight, about in excerpt.weights.items():
        module, shape = weight.removesuffix(".weight"), tuple(about["shape"])
        found = excerpt.reader.read(module, shape)
        if not isinstance(found, Dense):
            found = dataclasses.replace(found, dtype=found.dtype or np.dtype("float16"))
            yield module, shape, found


@pytest.mark.parametrize("name", _cases())
def test_a_layer_written_again_is_the_same(name):
    excerpt = load(name)
    codec = CODECS[WRITABLE[name.partition("-")[0]]]
    assert codec.write is not None
    for module, shape, layer in _layers(name, excerpt):
        writer = codec.write()
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                writer.write(module, layer)
            continue
        tensors, note = writer.write(module, layer)
        assert not note
        tensors = {
            n: writer.finish(n, t) if n.endswith(writer.late) else t
            for n, t in tensors.items()
        }
        source = Memory(tensors)
        again = codec.read(writer.config(), source).read(module, shape)
        again = dataclasses.replace(again, dtype=again.dtype or layer.dtype)
        np.testing.assert_array_equal(again.codes, layer.codes)
        one, other = again.tensor(), layer.tensor()
        np.testing.assert_array_equal(one.dequantize(), other.dequantize())
        assert again.activation == layer.activation
        if name not in OTHER_BYTES:
            _compare_bytes(excerpt, module, tensors, writer)


def _compare_bytes(excerpt, module, tensors, writer):
    version = writer.config().get("format", "gptq")
    stored = excerpt.config.get("checkpoint_format", "gptq")
    for name, tensor in tensors.items():
        if "quant_state" in name:
            continue  # JSON, whose keys have no order
        if name not in excerpt.source:
            assert name.endswith(("g_idx", "weight_shape"))
            continue
        original = excerpt.source.read(name)
        if name.endswith("qzeros") and version != stored:
            continue  # v1 where no zero point is 0, whatever it was
        if original.dtype != tensor.dtype:
            assert name.endswith(("scale", "scale_inv", "weight_scale"))
            tensor = tensor.astype(original.dtype)
        assert tensor.shape == original.shape or tensor.size == 1
        assert tensor.tobytes() == original.tobytes(), name


@pytest.mark.parametrize("codec", [c for c in CODECS.values() if c.write])
def test_what_cannot_be_expressed_is_refused_with_a_reason(codec):
    excerpt = load("compressed_tensors-w8a16_channel_bias")
    module, _, layer = next(_layers("", excerpt))
    odd = dataclasses.replace(
        layer, offset=np.zeros((1, 1), np.float32), input_scale=None
    )
    with pytest.raises(ValueError, match="offset"):
        codec.write().write(module, odd)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_refused_layer_leaves_no_settings(name):
    """That scales do not fit 16 bits is found out last, and a head then stays float."""
    _, _, layer = next(_layers("", load("awq-autoawq_gemm_g32")))
    thirds = layer.scales.astype(np.float32) / 3
    spec = dataclasses.replace(layer.spec, scale="float32")
    odd = dataclasses.replace(layer, scales=thirds, spec=spec)
    write = CODECS[name].write
    assert write is not None
    writer = write()
    with pytest.raises(ValueError, match="16 bits would round"):
        writer.write("lm_head", odd)
    assert vars(writer) == vars(write())


def _layer(rows, group):
    rng = np.random.default_rng(rows + group)
    return Unpacked(
        codes=rng.integers(0, 16, (rows, 32), np.uint8),
        scales=rng.uniform(0.5, 1, (rows // group, 32)).astype(np.float16),
        spec=QuantSpec("uint4", group, symmetric=False, scale="float16"),
        block=(group, 1),
        dtype=np.dtype("float16"),
        zeros=rng.integers(1, 16, (rows // group, 32), np.uint8),
    )


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_layer_of_one_group_has_the_size_of_the_others(name, first):
    codec = CODECS[name]
    assert codec.write is not None
    writer = codec.write()
    layers = {"long": _layer(64, 32), "short": _layer(32, 32)}
    tensors = {}
    for module in sorted(layers, reverse=bool(first)):
        tensors |= writer.write(module, layers[module])[0]
    config = writer.config()
    assert config["group_size"] == 32
    assert "dynamic" not in config
    stored = {
        n: writer.finish(n, t) if n.endswith(writer.late) else t
        for n, t in tensors.items()
    }
    for module, layer in layers.items():
        again = codec.read(config, Memory(stored)).read(module, layer.shape[::-1])
        np.testing.assert_array_equal(again.codes, layer.codes)
        np.testing.assert_array_equal(again.zeros, layer.zeros)
    if name == "awq":  # GPTQ says so for each layer
        for other, message in (
            (_layer(96, 96), "one group of 96"),
            (_layer(64, 16), "16"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.write("other", other)
    else:
        writer.write("other", _layer(96, 96))
        assert writer.config()["dynamic"]["+:^other$"]["group_size"] == -1


def test_autoround_names_its_blocks_and_what_differs():
    write = CODECS["auto-round"].write
    assert write is not None
    writer = write()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    for name in names:
        writer.write(name, _layer(64, 32))
    writer.write("model.layers.3.mlp.up_proj", _layer(64, 16))
    writer.write("lm_head", _layer(64, 32))
    writer.leave("model.layers.4.mlp.up_proj")
    config = writer.config()
    assert config["block_name_to_quantize"] == "model.layers"
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, False)
    assert config["packing_format"] == "auto_round"
    extra = {
        name: about.get("group_size") for name, about in config["extra_config"].items()
    }
    assert extra == {
        "model.layers.3.mlp.up_proj": 16,
        "model.layers.4.mlp.up_proj": None,
        "lm_head": 32,
    }
    assert config["extra_config"]["model.layers.4.mlp.up_proj"] == {"bits": 16}


def test_writers_are_made_anew():
    """One checkpoint's settings do not leak into the next."""
    for codec in CODECS.values():
        if codec.write:
            assert isinstance(codec.write, type)
            assert vars(codec.write()) == vars(codec.write())
    assert isinstance(CODECS, dict | types.MappingProxyType)


NVFP4 = QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor"))
# What a layer's input may be: how it is quantized, its static scale, and what
# compressed-tensors does otherwise (empty: nothing; None: it stays float there).
INPUTS = [
    (NVFP4, 0.5, ""),
    (NVFP4, None, None),
    (QuantSpec("fp4_e2m1", 32, scale="e8m0", exponent="near"), None, ""),
    (QuantSpec("fp8_e4m3", 32, scale="e8m0", exponent="near"), None, ""),
    (QuantSpec("fp8_e4m3", 32, scale="e8m0"), None, "from 1.75 .* not by 'floor'"),
    (QuantSpec("fp8_e4m3", 64, scale="e8m0", exponent="near"), None, None),
    (QuantSpec("fp8_e4m3", 64), None, ""),
    (QuantSpec("fp8_e4m3", "token", scale="bfloat16"), None, ""),
    (QuantSpec("fp8_e5m2", "token"), None, None),
    (QuantSpec("int4", "token", grid="gptq"), None, ""),
    (QuantSpec("int4", "token"), None, r"magnitude / 7\.5 there, not / 7"),
    (QuantSpec("int8", "token"), None, r"magnitude / 127\.5 there, not / 127"),
    (QuantSpec("uint8", "token", symmetric=False), None, None),
]


@pytest.mark.parametrize(("spec", "static", "note"), INPUTS, ids=str)
def test_how_inputs_are_quantized_is_written_or_the_difference_said(spec, static, note):
    scale = None if static is None else np.full((1, 1), static, np.float32)
    layer = dataclasses.replace(_layer(64, 32), activation=spec, activation_scale=scale)
    codec = CODECS["compressed-tensors"]
    assert codec.write is not None
    writer = codec.write()
    tensors, said = writer.write("a", layer)
    again = codec.read(writer.config(), Memory(tensors)).read("a", (32, 64))
    assert not isinstance(again, Dense)
    if note is None:
        assert "is no longer quantized" in said
        assert again.activation is None
        return
    assert re.search(note, said) if note else not said
    found = again.activation
    assert found is not None
    if spec is NVFP4:  # they divide by the static scale of scales
        inner = QuantSpec("fp8_e4m3", "tensor", scale="inverse_float32")
        assert found == dataclasses.replace(spec, scale=inner)
        assert tensors["a.input_global_scale"] == again.activation_scale == 2
    elif not note:
        assert found == spec
        assert again.activation_scale is None


def test_the_preset_nvfp4_is_written_as_it_is():
    """Of this weight no divisor gives the numbers that a factor does."""
    layer = load_model("demo").params["params"]["layers_1"]["mlp"]["up_proj"]
    write = CODECS["compressed-tensors"].write
    assert write is not None
    spec = PRESETS["nvfp4"].rules[-1].weight
    made = Unpacked.of(quantize(layer["kernel"], spec))
    tensors, note = write().write("a", made)
    assert not note
    assert tensors["a.weight_global_scale"] == made.scales.scales
    factor = dataclasses.replace(spec, scale=QuantSpec("fp8_e4m3", "tensor"))
    with pytest.raises(UnsupportedError, match="no number divides them"):
        write().write("a", Unpacked.of(quantize(layer["kernel"], factor)))
