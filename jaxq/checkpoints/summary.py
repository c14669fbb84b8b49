"""`inspect`: what a checkpoint holds, without reading its numbers."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax

from jaxq.checkpoints import data_files, manifest, parameter, strict_json
from jaxq.checkpoints.backends import BACKENDS
from jaxq.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        path: its keys joined with "/".
        kind: ``"qtensor"``, ``"array"`` or ``"value"``.
        spec: how it is quantized, or its dtype.
        shape: of the tensor it stands for.
        bytes: stored bytes, scales and zero points included.
        bits_per_weight: ``8 · bytes / elements``.
    """

    path: str
    kind: str
    spec: str
    shape: tuple[int, ...]
    bytes: int
    bits_per_weight: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a checkpoint holds.

    Attributes:
        path: the folder.
        backend: ``"safetensors"`` or ``"orbax"``.
        written_by: the program and its version.
        rows: one per parameter.
        files: bytes of each file with numbers, as they are on the disk.
        config: the model's `config.json`, or None.
        extra_files: the names of the other files.
        recipe: how it was quantized, or None.
        metadata: as it was given to `jaxq.save`.
    """

    path: Path
    backend: str
    written_by: str
    rows: tuple[Row, ...]
    files: dict[str, int]
    config: dict[str, Any] | None
    extra_files: tuple[str, ...]
    recipe: Any
    metadata: dict[str, Any]

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bytes(self) -> int:
        """Stored bytes of all parameters."""
        return sum(row.bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, over all parameters."""
        return self.bytes * 8 / max(self.parameters, 1)

    @property
    def quantized_bits_per_weight(self) -> float:
        """Stored bits per element, over the quantized parameters; 0 without any."""
        rows = [row for row in self.rows if row.kind == "qtensor"]
        elements = sum(math.prod(row.shape) for row in rows)
        return sum(row.bytes for row in rows) * 8 / max(elements, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, totals included, for JSON."""
        out = dataclasses.asdict(self) | {"path": str(self.path)}
        for name in ("parameters", "bytes", "bits_per_weight"):
            out[name] = getattr(self, name)
        return out | {"quantized_bits_per_weight": self.quantized_bits_per_weight}

    def __str__(self) -> str:
        """Return a plain table."""
        width = max((len(row.path) for row in self.rows), default=4)
        kind = max((len(row.spec) for row in self.rows), default=4)
        lines = [
            f"{r.path:<{width}}  {r.spec:<{kind}}  {'x'.join(map(str, r.shape)):>16}"
            f"  {r.bytes:>14,} bytes  {r.bits_per_weight:7.3f} bits"
            for r in self.rows
        ]
        lines.append(
            f"{self.parameters:,} parameters in {self.bytes:,} bytes: "
            f"{self.bits_per_weight:.3f} bits per weight ({self.backend}, "
            f"{len(self.files)} files, {self.written_by})"
        )
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Summary:
    """Describe a checkpoint that `save` wrote; no tensor data is read.

    Files are checked for being there, their sizes and their headers.

    Args:
        path: the folder.

    Raises:
        CheckpointError: as `load` does, but for altered numbers.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxq.checkpoints import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(inspect(save(f"{folder}/model", {"w": jnp.ones((2, 2))})).bytes)
        16
    """
    folder = Path(path).absolute()
    found = manifest.read(folder)
    data_files.check_sizes(folder, found)
    BACKENDS[found.backend].check_headers(folder, found)
    return Summary(
        path=folder,
        backend=found.backend,
        written_by=found.written_by,
        rows=tuple(_row(path, leaf) for path, leaf in found.params.items()),
        files={name: file.bytes for name, file in found.files.items()},
        config=_config(folder / "config.json"),
        extra_files=found.extra_files,
        recipe=found.recipe,
        metadata=dict(found.metadata),
    )


def _row(path: str, leaf: parameter.Abstract) -> Row:
    if isinstance(leaf, QTensor):
        spec = leaf.spec.describe()
        if leaf.activation is not None:
            spec += f", {leaf.activation.describe()} input"
        return Row(path, "qtensor", spec, leaf.shape, leaf.nbytes, leaf.bits_per_weight)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        bits = 8 * leaf.dtype.itemsize
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        return Row(path, "array", leaf.dtype.name, leaf.shape, size, float(bits))
    # a plain value lives in the manifest and costs no tensor bytes
    return Row(path, "value", f"{type(leaf).__name__} {json.dumps(leaf)}", (), 0, 0.0)


def _config(path: Path) -> dict[str, Any] | None:
    return strict_json.parse(path.read_bytes(), str(path)) if path.is_file() else None
