"""torchao checkpoints as transformers writes them: safetensors with a schema inside.

The header's metadata says for every parameter ``a.b.weight`` which tensor class it is;
its parts are stored as ``a.b._weight_<part>``.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxq.checkpoints import strict_json
from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.floats import e8m0_patterns, float_matrix, fp4_matrix
from jaxq.codecs.source import FLOATS, SafetensorsSource, Source, need
from jaxq.codecs.torchao_activation import activation
from jaxq.codecs.unpacked import Unpacked, block_name
from jaxq.codecs.words import nibbles
from jaxq.spec import QuantSpec

PARTS = (
    *("qdata", "scale", "zero_point", "per_tensor_scale", "act_per_tensor_scale"),
    *("act_quant_scale", "act_quant_zero_point", "act_pre_scale"),
)
# scales of the input that are not applied
UNAPPLIED = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")
DTYPES = {
    "torch.float16": np.dtype("float16"),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.float32": np.dtype("float32"),
}
KNOWN = (
    *("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"),
    *("MXTensor", "NVFP4Tensor"),
)


@dataclasses.dataclass(frozen=True)
class TorchAOReader:
    """Reads torchao layers.

    Attributes:
        source: the tensors.
        metadata: of the safetensors headers: the schema of each parameter, as JSON.
    """

    source: Source
    metadata: Mapping[str, str]

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer."""
        names = (f"{module}._weight_{part}" for part in PARTS)
        found = tuple(name for name in names if name in self.source)
        return found if f"{module}._weight_qdata" in found else ()

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked:
        """Return a layer's codes, scales and zero points as they are."""
        schema = self._schema(module)
        kind, data = schema["_type"], schema["_data"]
        w = self._weight(kind, data, f"{module}._weight_", shape)
        return self._with_activation(w, data, f"{module}._weight_")

    def _with_activation(
        self, w: Unpacked, data: Mapping[str, Any], stem: str
    ) -> Unpacked:
        """Add how the layer's input is quantized, where products can do that."""
        acts = ("act_quant_kwargs", "activation_quantization")
        if all(data.get(key) is None for key in acts):
            return w
        name = f"{stem}act_per_tensor_scale"
        static = name in self.source
        others = [f"{stem}{part}" in self.source for part in UNAPPLIED]
        spec = None if any(others) else activation(data, static)
        if spec is None:
            return dataclasses.replace(w, note="its activation stays float")
        scale = None
        if static and isinstance(spec.scale, QuantSpec):
            scale = need(self.source, name, ("F32",), (), (1,), (1, 1)).reshape(1, 1)
        return dataclasses.replace(w, activation=spec, activation_scale=scale)

    def _weight(
        self, kind: str, data: Mapping[str, Any], stem: str, shape: tuple[int, int]
    ) -> Unpacked:
        if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            return self._integers(stem, shape, kind, data)
        if kind == "Float8Tensor":
            codes = need(self.source, f"{stem}qdata", ("F8_E4M3",), shape)
            scales, block = self._scales(f"{stem}scale", shape, FLOATS)
            dtype = _dtype(data, stem)
            name = np.dtype(scales.dtype).name
            return float_matrix(codes.T, scales.T, name, block, dtype)
        if kind == "MXTensor":
            return self._mx(stem, shape, data)
        return self._nvfp4(stem, shape, data)

    def unused(self) -> Mapping[str, str]:
        """Nothing is left unread."""
        return {}

    def _integers(
        self, stem: str, shape: tuple[int, int], kind: str, data: Mapping[str, Any]
    ) -> Unpacked:
        bits = 8 if kind == "Int8Tensor" else _bits(data, stem)
        codes = need(self.source, f"{stem}qdata", ("I8",), shape)
        half = 2 ** (bits - 1)
        if codes.min() < -half or codes.max() >= half:
            raise CheckpointError(
                f"{self.source.where(f'{stem}qdata')} holds {codes.min()} to "
                f"{codes.max()}, which are no {bits}-bit integers"
            )
        scales, block = self._scales(f"{stem}scale", shape, FLOATS)
        zeros = None
        if f"{stem}zero_point" in self.source:
            zeros = need(
                self.source, f"{stem}zero_point", ("I8",), scales.shape, (scales.size,)
            )
            zeros = zeros.reshape(scales.shape).T
        symmetric = zeros is None or not zeros.any()
        patterns = codes.view(np.uint8)
        if bits < 8:
            patterns = patterns + np.uint8(half)
        spec = QuantSpec(
            f"int{bits}",
            block_name(block, shape[::-1]),
            symmetric=symmetric,
            grid="gptq" if symmetric else "restricted",
            scale=np.dtype(scales.dtype).name,
        )
        dtype = _dtype(data, stem)
        return Unpacked(
            patterns.T, scales.T, spec, block, dtype, None if symmetric else zeros
        )

    def _scales(
        self, name: str, shape: tuple[int, int], dtypes: tuple[str, ...]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Return scales ``[out, groups]`` and the block ``(in, out)`` they imply."""
        scales = need(self.source, name, dtypes)
        if scales.size == 1:
            return scales.reshape(1, 1), (shape[1], shape[0])
        if scales.ndim == 1:
            scales = scales[:, None]
        groups = scales.shape[-1]
        fits = scales.ndim == 2 and len(scales) == shape[0] and groups
        if not fits or shape[1] % groups:
            raise CheckpointError(
                f"{self.source.where(name)} has the shape {scales.shape}, which does "
                f"not divide a weight of {list(shape)} into groups"
            )
        return scales, (shape[1] // groups, 1)

    def _mx(
        self, stem: str, shape: tuple[int, int], data: Mapping[str, Any]
    ) -> Unpacked:
        columns, rows = shape
        grid = columns, -(-rows // 32)
        scales = need(self.source, f"{stem}scale", ("F8_E8M0", "U8"))
        scales = self._unswizzled(f"{stem}scale", e8m0_patterns(scales), grid, data)
        dtype = self.source.entry(f"{stem}qdata")[0]
        if dtype == "U8":
            packed = need(self.source, f"{stem}qdata", ("U8",), (columns, rows // 2))
            return fp4_matrix(nibbles(packed).T, scales.T, None)
        codes = need(self.source, f"{stem}qdata", ("F8_E4M3",), shape)
        wide = DTYPES["torch.bfloat16"]
        return float_matrix(codes.T, scales.T, "e8m0", (32, 1), wide)

    def _nvfp4(
        self, stem: str, shape: tuple[int, int], data: Mapping[str, Any]
    ) -> Unpacked:
        columns, rows = shape
        packed = need(self.source, f"{stem}qdata", ("U8",), (columns, rows // 2))
        scales = need(self.source, f"{stem}scale", ("F8_E4M3",))
        grid = columns, -(-rows // 16)
        scales = self._unswizzled(f"{stem}scale", scales, grid, data)
        world = np.ones((1, 1), np.float32)
        if f"{stem}per_tensor_scale" in self.source:
            name = f"{stem}per_tensor_scale"
            world = need(self.source, name, ("F32",), (), (1,), (1, 1)).reshape(1, 1)
        return fp4_matrix(nibbles(packed).T, scales.T, world)

    def _unswizzled(
        self,
        name: str,
        scales: np.ndarray,
        grid: tuple[int, int],
        data: Mapping[str, Any],
    ) -> np.ndarray:
        """Return scales by row and group, from tiles of 128 x 4 stored as 32 x 16."""
        tiles = -(-grid[0] // 128), -(-grid[1] // 4)
        stored = math_shape(tiles) if data.get("is_swizzled_scales") else grid
        if scales.shape != stored:
            raise CheckpointError(
                f"{self.source.where(name)} has the shape {scales.shape}; the weight "
                f"makes it {stored}"
            )
        if not data.get("is_swizzled_scales"):
            return scales
        split = scales.reshape(*tiles, 32, 4, 4).transpose(0, 3, 2, 1, 4)
        return split.reshape(128 * tiles[0], 4 * tiles[1])[: grid[0], : grid[1]]

    def _schema(self, module: str) -> Mapping[str, Any]:
        name = f"{module}.weight"
        where = f"the metadata of {name!r}"
        text = self.metadata.get(name)
        if text is None:
            raise CheckpointError(
                f"{where} is missing; the checkpoint was not written by torchao's "
                "safetensors support, or lost its header metadata"
            )
        schema = strict_json.parse(text.encode(), where)
        kind = strict_json.get(schema, "_type", str, where)
        strict_json.get(schema, "_data", dict, where)
        if kind not in KNOWN:
            raise UnsupportedError(
                f"{where}: {strict_json.shorten(kind)} is not implemented; known are "
                f"{', '.join(KNOWN)} (others are laid out for one kind of device)"
            )
        return schema


def math_shape(tiles: tuple[int, int]) -> tuple[int, int]:
    """Return the stored shape of swizzled scales."""
    return 32 * tiles[0], 16 * tiles[1]


def _bits(data: Mapping[str, Any], stem: str) -> int:
    word = re.search(r"\bint([1-8])\b", str(data.get("target_dtype")))
    if not word or word[1] == "1":
        raise CheckpointError(
            f"the metadata of {stem!r}: target_dtype is "
            f"{strict_json.shorten(data.get('target_dtype'))}; int2 to int8 are known"
        )
    return int(word[1])


def _dtype(data: Mapping[str, Any], module: str) -> np.dtype:
    given = data.get("dtype")
    word = given.get("_data") if isinstance(given, dict) else given
    word = f"torch.{str(word).removeprefix('torch.')}"
    if word not in DTYPES:
        raise CheckpointError(
            f"the metadata of {module!r}: dtype is {strict_json.shorten(given)}; known "
            f"are {', '.join(DTYPES)}"
        )
    return DTYPES[word]


def read(config: Mapping[str, Any], source: Source) -> TorchAOReader:
    """Return the reader of a checkpoint whose ``quant_method`` is ``torchao``."""
    del config
    metadata = source.metadata if isinstance(source, SafetensorsSource) else {}
    return TorchAOReader(source, metadata)
