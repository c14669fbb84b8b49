"""Write compressed-tensors checkpoints: packed or int8 integers, fp8, nvfp4, mxfp4."""

import json
from typing import Any

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.base import Writer
from jaxq.codecs.integers import integers_of, refuse_extras, refuse_order
from jaxq.codecs.unpacked import Unpacked
from jaxq.codecs.words import pack_stream, pair_nibbles
from jaxq.spec import QuantSpec

VERSION = "0.20.0"  # widths that do not divide 32 are dense streams since 0.18
# how the library rounds scales: as jaxq calls it -> as torch does
E4M3 = "torch.float8_e4m3fn"
SCALE_DTYPES = {
    "float32": None,
    "bfloat16": "torch.bfloat16",
    "float16": "torch.float16",
    "e8m0": "torch.uint8",
}
NEIGHBOURS = 3  # float32 numbers tried on either side of a reciprocal
Tensors = dict[str, np.ndarray]


class CompressedTensorsWriter(Writer):
    """Writes compressed-tensors layers, and groups them by their settings."""

    def __init__(self) -> None:
        self.groups: dict[str, list[str]] = {}  # settings as JSON -> layers
        self.floats: list[str] = []

    def write(self, module: str, w: Unpacked) -> tuple[Tensors, str]:
        """Return the tensors of a layer, and a note."""
        refuse_extras(w)
        refuse_order(w)
        kind = w.spec.format
        if kind == "fp8_e4m3":
            tensors, settings = _fp8(module, w)
        elif kind == "fp4_e2m1":
            tensors, settings = _fp4(module, w)
        else:
            tensors, settings = _integers(module, w)
        inputs, note = _activation(w)
        if inputs is not None and w.activation_scale is not None:
            tensors |= _static(module, w)
        settings |= {"input_activations": inputs, "output_activations": None}
        key = json.dumps(settings, sort_keys=True)
        self.groups.setdefault(key, []).append(module)
        return tensors, note

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize with: 4 bits, symmetric, groups of 128."""
        group = 128 if shape[0] % 128 == 0 else "channel"
        scale = "float16" if np.dtype(dtype).name == "float16" else "bfloat16"
        return QuantSpec("int4", group, grid="gptq", scale=scale)

    def config(self) -> dict[str, Any]:
        """Return the quantization config: one group where all layers are alike."""
        groups = {}
        for i, (key, modules) in enumerate(self.groups.items()):
            alike = len(self.groups) == 1
            targets = ["Linear"] if alike else sorted(modules)
            groups[f"group_{i}"] = {**json.loads(key), "targets": targets}
        formats = {group["format"] for group in groups.values()}
        mixed = len(formats) > 1
        return {
            "quant_method": "compressed-tensors",
            "config_groups": groups,
            "format": "mixed-precision" if mixed else formats.pop(),
            "global_compression_ratio": None,
            "ignore": sorted(self.floats),
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }


def _args(bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    """Return all the settings of an operand, as the library writes them."""
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": None if others.get("dynamic") else "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
        **others,
    }


def _integers(module: str, w: Unpacked) -> tuple[Tensors, dict[str, Any]]:
    found = integers_of(w)
    rows, columns = w.shape
    if rows % found.group:
        raise UnsupportedError(
            f"compressed-tensors needs whole groups, and it has {rows} channels in "
            f"groups of {found.group}"
        )
    whole = found.group >= rows
    weights = _args(
        found.bits,
        "int",
        "channel" if whole else "group",
        symmetric=found.symmetric,
        group_size=None if whole else found.group,
        zp_dtype=None if found.symmetric else "torch.int8",
    )
    scales = {f"{module}.weight_scale": np.ascontiguousarray(found.scales.T)}
    zeros = np.ascontiguousarray(found.zeros.T)
    name = f"{module}.weight_zero_point"
    if found.bits == 8 and w.activation is not None:
        codes = np.ascontiguousarray((found.codes ^ np.uint8(0x80)).T).view(np.int8)
        if not found.symmetric:
            scales[name] = (zeros ^ np.uint8(0x80)).view(np.int8)
        tensors = {f"{module}.weight": codes, **scales}
        return tensors, {"weights": weights, "format": "int-quantized"}
    if not found.symmetric:
        scales[name] = pack_stream(zeros, found.bits, 0)
    packed = pack_stream(np.ascontiguousarray(found.codes.T), found.bits, 1)
    return {
        f"{module}.weight_packed": packed,
        f"{module}.weight_shape": np.asarray([columns, rows], np.int64),
        **scales,
    }, {"weights": weights, "format": "pack-quantized"}


def _fp8(module: str, w: Unpacked) -> tuple[Tensors, dict[str, Any]]:
    if isinstance(w.scales, Unpacked):
        raise UnsupportedError("its scales are quantized themselves")
    rows = w.shape[0]
    codes = np.ascontiguousarray(w.codes.T).view(ml_dtypes.float8_e4m3fn)
    scales = np.ascontiguousarray(w.scales.T)
    stored = {f"{module}.weight": codes, f"{module}.weight_scale": scales}
    if w.spec.scale == "e8m0":
        if w.block != (32, 1) or rows % 32:
            raise UnsupportedError(
                f"mxfp8 has groups of 32, and it has {w.block[0]} of {rows} channels"
            )
        weights = _args(8, "float", "group", group_size=32, scale_dtype="torch.uint8")
        return stored, {"weights": weights, "format": "mxfp8-quantized"}
    if w.spec.scale in ("e4m3", "inverse_float32"):
        raise UnsupportedError(f"its scales are {w.spec.scale}, which fp8 has not")
    if w.grid() == (1, 1):
        weights = _args(8, "float", "tensor")
        stored[f"{module}.weight_scale"] = scales.reshape(1)
    elif w.block[1] == 1 and w.block[0] >= rows:
        weights = _args(8, "float", "channel")
    elif w.block[1] > 1:
        weights = _args(8, "float", "block", block_structure=list(w.block[::-1]))
    else:
        raise UnsupportedError(
            f"fp8 has scales per tensor, channel or tile, not of {w.block[0]} channels"
        )
    return stored, {"weights": weights, "format": "float-quantized"}


def _fp4(module: str, w: Unpacked) -> tuple[Tensors, dict[str, Any]]:
    if w.shape[0] % 32:
        raise UnsupportedError(f"fp4 needs whole groups, and it has {w.shape[0]} rows")
    packed = pair_nibbles(np.ascontiguousarray(w.codes.T))
    stored = {f"{module}.weight_packed": packed}
    name = f"{module}.weight_scale"
    if w.spec.scale == "e8m0" and w.block == (32, 1):
        assert isinstance(w.scales, np.ndarray)
        stored[name] = np.ascontiguousarray(w.scales.T)
        weights = _args(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
        return stored, {"weights": weights, "format": "mxfp4-pack-quantized"}
    scales = w.scales
    two = isinstance(scales, Unpacked) and scales.spec.format == "fp8_e4m3"
    plain = w.spec.scale == "e4m3"
    if w.block != (16, 1) or not (two or plain):
        raise UnsupportedError(
            f"nvfp4 is groups of 16 with e4m3 scales and mxfp4 groups of 32 with e8m0 "
            f"scales, and it is {w.spec.describe()}"
        )
    small = scales.codes if isinstance(scales, Unpacked) else scales
    small = np.ascontiguousarray(small.T).view(ml_dtypes.float8_e4m3fn)
    stored[name] = small
    stored[f"{module}.weight_global_scale"] = _divisor(scales, small)
    weights = _args(
        4,
        "float",
        "tensor_group",
        group_size=16,
        scale_dtype=E4M3,
    )
    return stored, {"weights": weights, "format": "nvfp4-pack-quantized"}


def _divisor(scales: Any, small: np.ndarray) -> np.ndarray:
    """Return the number that divides the scales, float32 ``[1]``.

    Where one multiplies, a reciprocal is sought that gives the same bfloat16 weights.
    """
    if not isinstance(scales, Unpacked):
        return np.ones(1, np.float32)
    world = np.asarray(scales.scales, np.float32).reshape(-1)
    if world.size != 1:
        raise UnsupportedError("its scales have several scales")
    if scales.spec.scale == "inverse_float32":
        return world
    numbers = np.asarray([0.5, 1, 1.5, 2, 3, 4, 6], np.float32)

    def weights(effective: np.ndarray) -> np.ndarray:
        return (effective.reshape(-1, 1) * numbers).astype(ml_dtypes.bfloat16)

    wide = np.unique(small.astype(np.float32))
    wanted, middle = weights(wide * world), np.float32(1) / world[0]
    bits = int(middle.view(np.int32))
    near = sorted(
        range(bits - NEIGHBOURS, bits + NEIGHBOURS + 1), key=lambda b: abs(b - bits)
    )
    for candidate in np.asarray(near, np.int32).view(np.float32):
        if (weights(wide / candidate) == wanted).all():
            return candidate.reshape(1)
    raise UnsupportedError(
        "its scales are multiplied, and no number divides them to the same weights"
    )


def _activation(w: Unpacked) -> tuple[dict[str, Any] | None, str]:
    """Return the settings of a layer's input, and a note where they differ."""
    spec = w.activation
    if spec is None:
        return None, ""
    lost = f"its activation ({spec.describe()}) is no longer quantized"
    kind = _kind(spec)
    if kind is None or spec.center or spec.outliers is not None:
        return None, lost
    if isinstance(spec.scale, QuantSpec):
        if not spec.static_number or (spec.format, spec.block) != ("fp4_e2m1", 16):
            return None, lost
        if w.activation_scale is None:
            return None, f"{lost}: nvfp4 has a static scale of scales (static=True)"
        args = _args(4, "float", "tensor_group", group_size=16, scale_dtype=E4M3)
        return {**args, "dynamic": "local"}, ""
    grouped = isinstance(spec.block, int)
    strategies = {"token": "token", "channel": "token", "tensor": "tensor"}
    strategy = "group" if grouped else strategies.get(str(spec.block))
    if strategy is None or not _has_scales(spec):
        return None, lost
    dynamic = w.activation_scale is None
    args = _args(
        spec.bits,
        kind,
        strategy,
        symmetric=spec.symmetric,
        dynamic=dynamic,
        group_size=spec.block if grouped else None,
        scale_dtype=SCALE_DTYPES[str(spec.scale)],
        zp_dtype=None if spec.symmetric else "torch.int8",
    )
    return args, _rounding(spec) if dynamic else ""


def _kind(spec: QuantSpec) -> str | None:
    """Return what the library calls the codes of an activation."""
    if spec.format in ("fp8_e4m3", "fp4_e2m1"):
        return "float"
    signed = spec.number_format.lowest < 0
    return "int" if spec.number_format.is_integer and signed else None


def _has_scales(spec: QuantSpec) -> bool:
    """Whether the library rounds an activation's scales as the spec says."""
    if spec.scale == "e8m0":
        return spec.block == 32 and _kind(spec) == "float"
    return spec.scale in SCALE_DTYPES and (
        spec.scale == "float32" or _kind(spec) == "float"
    )


def _rounding(spec: QuantSpec) -> str:
    """Return a note where the library finds other scales than the spec says."""
    if spec.scale == "e8m0" and spec.exponent != "near":
        return (
            "its activation's scales are rounded up there from 1.75 times a power of "
            f"two on, not by {spec.exponent!r}"
        )
    if _kind(spec) == "int" and spec.symmetric and spec.grid == "restricted":
        top = 2 ** (spec.bits - 1)
        return (
            f"its activation's scale is the largest magnitude / {top - 0.5:g} there, "
            f"not / {top - 1}"
        )
    return ""


def _static(module: str, w: Unpacked) -> Tensors:
    scale = np.asarray(w.activation_scale, np.float32).reshape(-1)
    if scale.size != 1:
        raise UnsupportedError("its activation has several static scales")
    inner = None if w.activation is None else w.activation.scale
    if isinstance(inner, QuantSpec):  # a divisor there
        divides = inner.scale == "inverse_float32"
        world = scale if divides else np.float32(1) / scale
        return {f"{module}.input_global_scale": world}
    tensors: Tensors = {f"{module}.input_scale": scale}
    if w.activation_zero is not None:
        zero = np.asarray(w.activation_zero, np.int8).reshape(1)
        tensors[f"{module}.input_zero_point"] = zero
    return tensors
