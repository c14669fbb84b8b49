"""compressed-tensors checkpoints (llm-compressor, vLLM).

Layers are assigned to groups of settings by name, pattern or class, and every group has
a format of its own. All matrices are ``[out, in]``. Integer codes are signed; packed
ones are stored plus ``2^(b − 1)`` as a dense stream along the input (until release 0.17
as whole fields of a word), zero points likewise along the output.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs import settings
from jaxq.codecs.base import Dense
from jaxq.codecs.floats import e8m0_patterns, float_matrix, fp4_matrix
from jaxq.codecs.groups import Args, Group, Groups
from jaxq.codecs.source import Source, check, need, parts_of
from jaxq.codecs.unpacked import Unpacked, block_name
from jaxq.codecs.words import nibbles, unpack_fields, unpack_stream
from jaxq.spec import QuantSpec

SCALES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
SUFFIXES = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
KV = "the scales of a quantized cache are not applied: the cache stays float"
UNUSED = {
    **dict.fromkeys(("k_scale", "v_scale", "q_scale"), KV),
    **dict.fromkeys(("k_zero_point", "v_zero_point"), KV),
    **dict.fromkeys(("output_scale", "output_zero_point"), "outputs stay float"),
}
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)


@dataclasses.dataclass(frozen=True)
class CompressedTensorsReader:
    """Reads compressed-tensors layers.

    Attributes:
        source: the tensors.
        groups: the settings of each layer.
        dtype: of the model: of what nvfp4 and mx weights stand for.
    """

    source: Source
    groups: Groups

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the tensors of a layer; a weight is quantized if it has a scale."""
        return parts_of(self.source, module, SUFFIXES, sign="weight_scale")

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked | Dense:
        """Return a layer's codes, scales and zero points as they are."""
        group = self.groups.find(module)
        if group is None or group.weights is None:
            raise CheckpointError(
                f"{self.source.where(f'{module}.weight_scale')}: the layer is "
                "quantized, but quantization_config ignores it or names no settings "
                "for it; they are of different models"
            )
        args, name = group.weights, f"{module}.weight"
        if f"{name}_packed" in self.source:
            dtype = self.source.entry(f"{name}_packed")[0]
            fp4 = dtype == "U8"
            w = self._fp4(module, shape) if fp4 else self._packed(module, shape, args)
        elif self.source.entry(name)[0].startswith("F8"):
            w = self._fp8(module, shape, args)
        else:
            w = self._integers(module, shape, args)
        return w if isinstance(w, Dense) else self._with_activation(w, module, group)

    def unused(self) -> Mapping[str, str]:
        """Return what is known and not read: the scales of a quantized cache."""
        return UNUSED

    def _packed(
        self, module: str, shape: tuple[int, int], args: Args
    ) -> Unpacked | Dense:
        columns, rows = shape
        name, bits = f"{module}.weight_packed", args.bits
        dense, fields = -(-rows * bits // 32), -(-rows // (32 // bits))
        check(self.source, name, ("I32",), (columns, dense), (columns, fields))
        self._check_shape(module, shape)
        unpack = self._unpack(name, bits, rows)
        codes = unpack(self.source.read(name), bits, 1, rows)
        scales, block = self._scales(module, shape, args)
        zeros = None
        if not args.symmetric:
            zeros = self._packed_zeros(module, bits, columns, scales.shape[1])
        return self._ordered(module, codes, scales, zeros, bits, block, args)

    def _unpack(self, name: str, bits: int, rows: int) -> Any:
        """Return how codes were packed: by the width, else by the writer's release."""
        width, fields = self.source.entry(name)[1][-1], -(-rows // (32 // bits))
        if fields == -(-rows * bits // 32):
            whole_words = 32 % bits == 0
            return unpack_stream if whole_words else self.groups.unpack
        return unpack_fields if width == fields else unpack_stream

    def _packed_zeros(
        self, module: str, bits: int, columns: int, groups: int
    ) -> np.ndarray:
        name = f"{module}.weight_zero_point"
        dense, fields = -(-columns * bits // 32), -(-columns // (32 // bits))
        words = need(self.source, name, ("I32",), (dense, groups), (fields, groups))
        if 32 % bits == 0:
            unpack = unpack_stream
        elif dense == fields:
            unpack = self.groups.unpack
        else:
            unpack = unpack_fields if len(words) == fields else unpack_stream
        return unpack(words, bits, 0, columns)

    def _integers(
        self, module: str, shape: tuple[int, int], args: Args
    ) -> Unpacked | Dense:
        name, bits = f"{module}.weight", args.bits
        values = need(self.source, name, ("I8",), shape)
        half = 2 ** (bits - 1)
        if bits < 8 and (values.min() < -half or values.max() >= half):
            raise CheckpointError(
                f"{self.source.where(name)} holds {values.min()} to {values.max()}; "
                f"quantization_config says {bits} bits, {-half} to {half - 1}"
            )
        scales, block = self._scales(module, shape, args)
        zeros = None
        if not args.symmetric:
            zeros = need(
                self.source, f"{module}.weight_zero_point", ("I8",), scales.shape
            )
            zeros = (zeros.astype(np.int16) + half).astype(np.uint8)
        codes = (values.view(np.uint8) + np.uint8(half)) & np.uint8(2**bits - 1)
        return self._ordered(module, codes, scales, zeros, bits, block, args)

    def _ordered(
        self,
        module: str,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        bits: int,
        block: tuple[int, int],
        args: Args,
    ) -> Unpacked | Dense:
        """Return unsigned codes ``[out, in]`` as a matrix, in the order of groups."""
        codes, scales = codes.T, scales.T
        zeros = None if zeros is None else zeros.T
        index = self._index(module, len(codes), len(scales))
        if index is None:
            return integers(codes, scales, zeros, bits, block)
        stable = np.argsort(index, kind="stable")
        if (index[stable] == np.arange(len(codes)) // block[0]).all():
            w = integers(codes[stable], scales, zeros, bits, block)
            return dataclasses.replace(w, index=stable.astype(np.int32))
        middle = 2 ** (bits - 1) if zeros is None else zeros[index]
        values = codes.astype(np.float32) - np.asarray(middle, np.float32)
        values = values * scales.astype(np.float32)[index]
        why = f"its weight_g_idx makes groups of other sizes than {args.group}"
        return Dense(values.astype(scales.dtype).T, why)

    def _index(self, module: str, rows: int, groups: int) -> np.ndarray | None:
        name = f"{module}.weight_g_idx"
        if name not in self.source:
            return None
        index = need(self.source, name, ("I32", "I64"), (rows,))
        if (index == -1).all():  # the writer's way to say that there is none
            return None
        if index.min() < 0 or index.max() >= groups:
            raise CheckpointError(
                f"{self.source.where(name)} names the groups {index.min()} to "
                f"{index.max()}; the layer has groups 0 to {groups - 1}"
            )
        trivial = (index == np.arange(rows) // max(rows // groups, 1)).all()
        return None if trivial else index

    def _scales(
        self, module: str, shape: tuple[int, int], args: Args
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Return scales ``[out blocks, in blocks]`` and the block ``(in, out)``."""
        block = args.block(shape)
        grid = tuple(-(-n // b) for n, b in zip(shape, block[::-1], strict=True))
        name = f"{module}.weight_scale"
        one = ((1,), ()) if grid == (1, 1) else ()
        row = ((shape[0],),) if grid == (shape[0], 1) else ()
        scales = need(self.source, name, tuple(SCALES), grid, *one, *row)
        return scales.reshape(grid), block

    def _check_shape(self, module: str, shape: tuple[int, int]) -> None:
        name = f"{module}.weight_shape"
        if name not in self.source:
            return
        stored = need(self.source, name, ("I64", "I32"), (2,))
        if tuple(stored.tolist()) != shape:
            raise CheckpointError(
                f"{self.source.where(name)} is {stored.tolist()}; config.json makes "
                f"the layer {list(shape)}"
            )

    def _fp8(self, module: str, shape: tuple[int, int], args: Args) -> Unpacked:
        codes = need(self.source, f"{module}.weight", ("F8_E4M3",), shape)
        name = f"{module}.weight_scale"
        if name in self.source and self.source.entry(name)[0] in ("U8", "F8_E8M0"):
            group = 32
            grid = shape[0], -(-shape[1] // group)
            scales = e8m0_patterns(need(self.source, name, ("U8", "F8_E8M0"), grid))
            dtype = np.dtype("bfloat16")
            return float_matrix(codes.T, scales.T, "e8m0", (group, 1), dtype)
        scales, block = self._scales(module, shape, args)
        kind = np.dtype(scales.dtype).name
        return float_matrix(codes.T, scales.T, kind, block, stands_for(scales))

    def _fp4(self, module: str, shape: tuple[int, int]) -> Unpacked:
        columns, rows = shape
        if rows % 2:
            raise CheckpointError(
                f"{self.source.where(f'{module}.weight_packed')}: {rows} input "
                "channels do not fill bytes of two"
            )
        packed = need(
            self.source, f"{module}.weight_packed", ("U8",), (columns, rows // 2)
        )
        codes = nibbles(packed).T
        name, world = f"{module}.weight_scale", f"{module}.weight_global_scale"
        if world in self.source:
            grid = columns, -(-rows // 16)
            scales = need(self.source, name, ("F8_E4M3",), grid)
            divisor = need(self.source, world, ("F32",), (1,), ())
            return fp4_matrix(codes, scales.T, divisor.reshape(1, 1), divides=True)
        grid = columns, -(-rows // 32)
        scales = e8m0_patterns(need(self.source, name, ("U8", "F8_E8M0"), grid))
        return fp4_matrix(codes, scales.T, None)

    def _with_activation(self, w: Unpacked, module: str, group: Group) -> Unpacked:
        """Add how the layer's input is quantized, where products can do that."""
        if group.inputs is None:
            return w
        spec = group.inputs.activation()
        if spec is None:
            return dataclasses.replace(w, note="its activation stays float")
        if isinstance(spec.scale, QuantSpec):
            name = f"{module}.input_global_scale"
            world = need(self.source, name, ("F32",), (1,), ()).reshape(1, 1)
            return dataclasses.replace(w, activation=spec, activation_scale=world)
        if group.inputs.dynamic:
            return dataclasses.replace(w, activation=spec)
        name = f"{module}.input_scale"
        scale = need(self.source, name, tuple(SCALES), (1,), ())
        zero = None
        if not spec.symmetric:
            name = f"{module}.input_zero_point"
            zero = need(self.source, name, ("I8",), (1,), ()).reshape(1, 1)
        scale = scale.astype(np.float32).reshape(1, 1)
        return dataclasses.replace(
            w, activation=spec, activation_scale=scale, activation_zero=zero
        )


def integers(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    block: tuple[int, int],
) -> Unpacked:
    """Return unsigned codes ``[in, out]`` as a matrix; signed when symmetric."""
    if zeros is None and bits == 8:
        codes = codes ^ 0x80  # int8 is stored as two's complement
    spec = QuantSpec(
        f"int{bits}" if zeros is None else f"uint{bits}",
        block_name(block, (codes.shape[0], codes.shape[1])),
        symmetric=zeros is None,
        grid="gptq" if zeros is None else "restricted",
        scale=np.dtype(scales.dtype).name,
    )
    return Unpacked(codes, scales, spec, block, stands_for(scales), zeros)


def stands_for(scales: np.ndarray) -> np.dtype | None:
    """Return the dtype of a weight: its scales', or the model's where they are wide."""
    return None if scales.dtype == np.float32 else scales.dtype


def read(config: Mapping[str, Any], source: Source) -> CompressedTensorsReader:
    """Return the reader of a ``compressed-tensors`` checkpoint.

    Raises:
        CheckpointError: the config is damaged.
        UnsupportedError: it is sparse, or rotates activations.
    """
    for key in ("sparsity_config", "transform_config"):
        said = settings.section(config, key)
        if said and said.get("format") not in ("dense", None):
            raise UnsupportedError(
                f"quantization_config: {key} is {shorten(said)}, which is not "
                "implemented; only dense weights without transforms are read"
            )
        if said and key == "transform_config" and said.get("config_groups"):
            raise UnsupportedError(
                f"quantization_config: {key} is {shorten(said)}, which is not "
                "implemented; only dense weights without transforms are read"
            )
    status = config.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise UnsupportedError(
            f"quantization_config: quantization_status is {shorten(status)}; only "
            "compressed checkpoints are read: save it with save_compressed=True"
        )
    return CompressedTensorsReader(source, Groups.of(config, FORMATS))
