"""Is it still the same model? Told from its files without reading all of them."""

import hashlib
from pathlib import Path
from typing import Any

from jaxq.checkpoints.errors import MissingFileError
from jaxq.checkpoints.safetensors import Header, read_header

SMALL = 16 * 2**20
PAGE = 4096


def file_identity(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of a model's files, as plain data to be compared later.

    Covered are all `*.json` and `*.safetensors` files of the folder. A file of weights
    larger than 16 MB is not hashed in full, which would take minutes for a large model,
    but its header (names, shapes, places), the first and the last 4 KB of the file and
    4 KB from the middle of every tensor. So another model, another fine-tuning, another
    precision or a file cut short or damaged at its end never has the same identity; a
    few numbers changed by hand between the samples are not noticed.

    Args:
        folder: of a model, as Hugging Face or `jaxq.save` lay it out.

    Returns:
        ``{file name: {"bytes": size, "sha256": ..., "hashed": "all" or "samples"}}``.

    Raises:
        MissingFileError: the folder holds no safetensors.
        CorruptError: a file of weights is truncated, or its header is damaged.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MissingFileError(f"{folder} holds no safetensors; name a model's folder")
    return {p.name: _identity(p) for p in (*sorted(folder.glob("*.json")), *weights)}


def _identity(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    sampled = path.suffix == ".safetensors" and size > SMALL
    with path.open("rb") as file:
        if not sampled:
            digest = hashlib.file_digest(file, "sha256")
        else:
            digest = hashlib.sha256()
            for start, length in _samples(read_header(path)):
                file.seek(start)
                digest.update(file.read(length))
    hashed = "samples" if sampled else "all"
    return {"bytes": size, "sha256": digest.hexdigest(), "hashed": hashed}


def _samples(header: Header) -> list[tuple[int, int]]:
    """Return the parts of a file that are hashed, as (start, length)."""
    samples = [(0, header.start + PAGE), (max(header.size - PAGE, 0), PAGE)]
    for entry in header.entries.values():
        length = min(entry.end - entry.start, PAGE)
        middle = (entry.start + entry.end - length) // 2
        samples.append((header.start + middle, length))
    return samples
