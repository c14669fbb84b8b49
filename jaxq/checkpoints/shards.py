"""The default backend: safetensors files of limited size, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxq.checkpoints import placement, safetensors
from jaxq.checkpoints.data_files import check_contents
from jaxq.checkpoints.dtypes import SAFETENSORS_NAMES
from jaxq.checkpoints.errors import CorruptError, MismatchError, UnsupportedError
from jaxq.checkpoints.manifest import DataFile, Manifest
from jaxq.heap import one_at_a_time

INDEX = "model.safetensors.index.json"


def write(
    folder: Path,
    manifest: Manifest,
    arrays: Mapping[str, Any],
    shard_bytes: int,
) -> dict[str, DataFile]:
    """Write every array into `model.safetensors`, or into numbered shards and an index.

    Args:
        folder: where to.
        manifest: names the arrays, with their shapes and dtypes.
        arrays: the arrays by name.
        shard_bytes: the limit of a file; a larger tensor gets a file of its own.

    Returns:
        The files written.

    Raises:
        UnsupportedError: an array lies on other processes' devices.
    """
    check_addressable(arrays)
    shards = list(_split(dict(manifest.tensors()), shard_bytes))
    files, where = {}, {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        files[name] = safetensors.write(
            folder / name, tensors, lambda key: placement.fetch(arrays[key])
        )
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_index(folder, files, where)
    return files


def check_addressable(arrays: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` if an array lies on other processes' devices."""
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise UnsupportedError(
                f"{name!r} lies in part on other processes' devices; save it with "
                "backend='orbax'"
            )


def write_index(
    folder: Path, files: Mapping[str, DataFile], where: Mapping[str, str]
) -> None:
    """Write which of several shards holds which tensor, as Hugging Face does."""
    total = sum(file.bytes for file in files.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def read(
    folder: Path, manifest: Manifest, places: placement.Places, verify: bool
) -> dict[str, Any]:
    """Read every array to its place.

    Raises:
        CorruptError: a file is damaged.
        MismatchError: files and manifest do not hold the same tensors.
    """
    check_headers(folder, manifest)
    if verify:
        check_contents(folder, manifest, manifest.files)
    tensors, arrays = dict(manifest.tensors()), {}
    for file in manifest.files:
        reader = safetensors.Reader(folder / file)
        put = (
            (name, placement.put(reader[name], tensors[name], places.get(name)))
            for name in reader.entries
        )
        arrays.update(one_at_a_time(put))
    return arrays


def check_headers(folder: Path, manifest: Manifest) -> None:
    """Check that the files hold the manifest's tensors and no others; no data is read.

    Raises:
        CorruptError: a header is damaged, or two files hold the same tensor.
        MismatchError: naming the file, the tensor and the two values.
    """
    tensors = dict(manifest.tensors())
    held: dict[str, str] = {}
    for file in manifest.files:
        for name, entry in safetensors.read_header(folder / file).entries.items():
            if name in held:
                raise CorruptError(
                    f"{folder / file} and {held[name]} both hold {name!a}; save the "
                    "checkpoint again"
                )
            held[name] = file
            if name not in tensors:
                raise MismatchError(
                    f"{folder / file} holds {name!a}, which jaxq.json does not list; "
                    "they belong to different checkpoints"
                )
            _compare(f"{folder / file}: {name!a}", entry, tensors[name])
    for name in tensors:
        if name not in held:
            raise MismatchError(
                f"{folder}: no file holds {name!a}, which jaxq.json lists; they belong "
                "to different checkpoints"
            )


def _compare(
    where: str, entry: safetensors.Entry, tensor: jax.ShapeDtypeStruct
) -> None:
    expected = safetensors.Entry.of(tensor, entry.start)
    for field in ("dtype", "shape"):
        found, wanted = getattr(entry, field), getattr(expected, field)
        if found != wanted:
            raise MismatchError(
                f"{where} has {field} {found}, but jaxq.json says {wanted} for a "
                f"{SAFETENSORS_NAMES[tensor.dtype.name] or tensor.dtype.name} tensor; "
                "they belong to different checkpoints"
            )


def _split(
    tensors: Mapping[str, jax.ShapeDtypeStruct], limit: int
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Yield the tensors of each shard, in order; one shard at least."""
    shard: dict[str, jax.ShapeDtypeStruct] = {}
    size = 0
    for name, tensor in tensors.items():
        needed = safetensors.Entry.of(tensor, 0).end
        if shard and size + needed > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += needed
    yield shard
