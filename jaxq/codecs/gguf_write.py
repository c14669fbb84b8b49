"""Write GGUF files as llama.cpp reads them: Q8_0 or Q4_0, and what stays float."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.folder import SPOOL, write_config
from jaxq.codecs.gguf_architectures import ARCHITECTURES, Architecture
from jaxq.codecs.gguf_blocks import FLOAT_TYPES, TYPES
from jaxq.codecs.gguf_file import ALIGNMENT, GGUFFile, Tensor, header
from jaxq.codecs.gguf_gemma import refuse_other_gemmas
from jaxq.codecs.gguf_names import gguf_name
from jaxq.codecs.gguf_rows import row_order
from jaxq.codecs.gguf_settings import (
    read_numbers,
    refuse_unsaid,
    to_config,
    write_settings,
)
from jaxq.codecs.integers import refuse_activation, refuse_extras, refuse_order
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec

NAME = "model.gguf"
# ggml's type -> what it holds, and what general.file_type calls a file mostly of it
TARGETS = {
    8: (QuantSpec("int8", 32, scale="float16"), 7),
    2: (QuantSpec("int4", 32, grid="full", scale="float16"), 2),
}
TYPE_OF = {spec.format: kind for kind, (spec, _) in TARGETS.items()}
FLOAT_KINDS = {dtype: kind for kind, (_, dtype) in FLOAT_TYPES.items()}


class GGUFSink:
    """Writes a model as one GGUF file, tensor by tensor.

    Tensors are spooled to a file beside, because their places come before them.

    Args:
        folder: an empty one.
        config: the model's, as Hugging Face has it.
        kind: ggml's type for layers that are requantized.

    Raises:
        UnsupportedError: GGUF cannot say all of the config.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], kind: int) -> None:
        self.folder, self.kind = folder, kind
        self.row, self.values, self.heads = _describe(folder / NAME, config)
        self.tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.spool = (folder / SPOOL).open("wb+")

    def quantized(self, module: str, w: Unpacked) -> str:
        """Write a quantized layer; return a note.

        Raises:
            UnsupportedError: the format cannot express it.
        """
        refuse_extras(w)
        refuse_order(w)
        kind = TYPE_OF.get(w.spec.format)
        encode = None if kind is None else TYPES[kind].encode
        if kind is None or encode is None:
            raise UnsupportedError(
                f"GGUF is written with Q8_0 and Q4_0, and it is {w.spec.describe()}"
            )
        blocks = self._in_order(module, encode(w))
        self._add(f"{module}.weight", kind, w.shape[::-1], blocks.tobytes())
        return refuse_activation(w)

    def floating(self, name: str, values: np.ndarray, is_layer: bool) -> None:
        """Write a float tensor; norms, biases and routers as float32, as ggml asks."""
        del is_layer
        if values.ndim == 1 or gguf_name(name, self.row).wide:
            values = values.astype(np.float32)
        if self.row.in_out and name.startswith(f"{self.row.blocks}."):
            values = values.T
        if name.endswith("norm.weight"):
            values = values + np.float32(self.row.norm_offset)
        values = self._in_order(name.rpartition(".")[0], np.ascontiguousarray(values))
        self._add(name, FLOAT_KINDS[values.dtype], values.shape, values.tobytes())

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize a layer with."""
        del dtype
        if shape[0] % 32:
            raise UnsupportedError(f"{shape[0]} channels are no whole blocks of 32")
        return TARGETS[self.kind][0]

    def close(self, config: Mapping[str, Any]) -> None:
        """Write the file, and a config beside it."""
        values = self.values | {"general.file_type": TARGETS[self.kind][1]}
        self.spool.write(bytes(-self.spool.tell() % ALIGNMENT))
        self.spool.seek(0)
        with (self.folder / NAME).open("wb") as file:
            file.write(header(values, self.tensors))
            shutil.copyfileobj(self.spool, file, 2**24)
        self.spool.close()
        (self.folder / SPOOL).unlink()
        write_config(self.folder, config)

    def release(self) -> None:
        """Let go of what is open, whatever happened; more than once if need be."""
        with contextlib.suppress(OSError):  # a full disk was told of already
            self.spool.close()

    def _add(self, name: str, kind: int, shape: tuple[int, ...], data: bytes) -> None:
        """Write a tensor, or the next of those that are stacked in one."""
        part = gguf_name(name, self.row)
        tensor, place = part
        shape = shape[1:] if part.flat else shape
        whole = shape if place is None else (place + 1, *shape)
        held, size = self.tensors.get(tensor), len(data)
        if place:
            if held is None or held[:2] != (kind, (place, *shape)):
                raise UnsupportedError(
                    f"{name!r} cannot be stacked behind what {tensor!r} holds: experts "
                    "of a layer must all be of one type, and in order"
                )
            size += held[2]
        else:
            self.spool.write(bytes(-self.spool.tell() % ALIGNMENT))
        self.tensors[tensor] = kind, whole, size
        self.spool.write(data)

    def _in_order(self, module: str, rows: np.ndarray) -> np.ndarray:
        """Move rows as llama.cpp has them."""
        order = row_order(self.row, module, len(rows), self.heads)
        return rows if order is None else rows[order]


def _describe(
    path: Path, config: Mapping[str, Any]
) -> tuple[Architecture, dict[str, Any], tuple[int, int]]:
    """Return the row of a model's architecture, its settings, and its heads."""
    from jaxq.models import find_family

    family = find_family(config)
    # a file that left out a setting would get llama.cpp's, which may be another
    config = {**family.defaults, **config}
    shape = family.read_config(config)
    slots = family.slots(shape)
    row = _row(config.get("model_type"), slots)
    values: dict[str, Any] = {
        "general.architecture": row.gguf,
        "general.type": "model",
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
        f"{row.gguf}.vocab_size": shape.vocab_size,
        **write_settings(shape, row),
    }
    if "token_types" in row.rows:
        values["tokenizer.ggml.token_type_count"] = shape.token_types
    if row.widest is not None:
        refuse_other_gemmas(row, config)
    if row.own_head and shape.tied:
        raise UnsupportedError(
            f"llama.cpp asks for a head in every {row.gguf} file, and this model's is "
            "its embedding (tie_word_embeddings)"
        )
    tensors = {
        gguf_name(name, row).tensor: Tensor(0, slot.shape, 0, 0)
        for name, slot in slots.items()
    }
    file = GGUFFile(path, 0, values, tensors)
    said = to_config(file, row, read_numbers(file, row))
    refuse_unsaid(row, shape, find_family(said).read_config(said))
    return row, values, (shape.num_heads, shape.num_kv_heads)


def _row(model_type: Any, names: Mapping[str, Any]) -> Architecture:
    """Return the row that has places for all tensors of a model."""
    rows = [row for row in ARCHITECTURES if model_type in row.model_types]
    if not rows:
        known = dict.fromkeys(t for row in ARCHITECTURES for t in row.model_types)
        raise UnsupportedError(
            f"GGUF is written for {', '.join(known)}, not for {model_type!r}"
        )
    for row in rows[:-1]:
        with contextlib.suppress(UnsupportedError):
            for name in names:
                gguf_name(name, row)
            return row
    return rows[-1]
