"""Layers that real libraries wrote: their tensors, and what they dequantize to."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxq.checkpoints.safetensors import read_header
from jaxq.codecs.base import Reader
from jaxq.codecs.gguf_file import ALIGNMENT, header
from jaxq.codecs.source import SafetensorsSource
from jaxq.codecs.table import codec_of

DATA = Path(__file__).parents[1] / "data" / "codecs"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))
DTYPES = {
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("float32"),
}


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """Some layers of a checkpoint.

    Attributes:
        config: its quantization config.
        source: the tensors.
        weights: by name: dtype, shape and digest of what the library makes of it.
    """

    config: Mapping[str, Any]
    source: SafetensorsSource
    weights: Mapping[str, Mapping[str, Any]]

    @property
    def reader(self) -> Reader:
        """The reader of its format."""
        config = self.config or {"quant_method": "hqq"}
        return codec_of(config).read(config, self.source)


def load(name: str) -> Excerpt:
    """Open an excerpt."""
    about = json.loads((DATA / f"{name}.json").read_text())
    header = read_header(DATA / f"{name}.safetensors")
    source = SafetensorsSource(dict.fromkeys(header.entries, header))
    return Excerpt(about["quantization_config"], source, about["weights"])


def digest(values: np.ndarray) -> str:
    """Return the digest of an array; both zeros count as one."""
    values = np.where(values == 0, np.zeros_like(values), values)
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def write_raw(
    path: Path,
    tensors: Mapping[str, tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors whose dtypes safetensors' NumPy lacks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, data = 0, b""
    for name, (dtype, array) in tensors.items():
        piece = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(piece)],
        }
        position, data = position + len(piece), data + piece
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_gguf(
    path: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
) -> None:
    """Write a GGUF file: ggml type, shape and bytes of every tensor."""
    sizes = {n: (kind, shape, len(data)) for n, (kind, shape, data) in tensors.items()}
    body = b"".join(
        data + bytes(-len(data) % ALIGNMENT) for _, _, data in tensors.values()
    )
    path.write_bytes(header(values, sizes) + body)
