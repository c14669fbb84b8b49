"""`save`: a tree of parameters, quantized or not, into a folder."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import atomic, manifest, parameter, shards, structure
from jaxq.checkpoints.backends import BACKENDS
from jaxq.checkpoints.errors import (
    CheckpointError,
    ExistsError,
    MissingFileError,
    UnsupportedError,
)
from jaxq.names import lookup
from jaxq.relayout import canonical_params

Content = str | bytes | os.PathLike[str]
CONFIG = "config.json"


def save(  # noqa: PLR0913  one verb, and everything that a checkpoint may carry
    path: str | os.PathLike[str],
    params: Any,
    *,
    config: Any = None,
    recipe: Any = None,
    metadata: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, Content] | None = None,
    backend: str = "safetensors",
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Write parameters into a folder, completely or not at all.

    The folder holds `jaxq.json`, which describes every parameter, and the numbers in
    safetensors or Orbax files. It appears under its name once everything is on the
    disk. A full disk or Ctrl-C leaves nothing behind, and an older one as it was; what
    a killed process leaves is a hidden folder `.NAME.*.partial`, which may be removed.

    Args:
        path: the folder to make.
        params: a tree of arrays, `QTensor`s and plain values (int, float, bool, str).
            Dicts, lists, tuples and Flax's FrozenDict are read back as such, other
            containers as dicts (or as themselves, see `load`).
        config: the model's config, a dict or an object with ``to_dict()``; becomes
            `config.json`, so that `jaxq.load_model` can load the folder.
        recipe: how the parameters were quantized: plain data, or ``to_dict()``.
        metadata: anything else worth knowing (evidence, provenance), as plain data.
        extra_files: further files by name, such as ``tokenizer.json``: their text,
            their bytes, or a `pathlib.Path` to copy.
        backend: ``"safetensors"``, or ``"orbax"`` for arrays sharded over a mesh.
        shard_bytes: the limit of one file; a single larger tensor goes beyond it.
        overwrite: whether a checkpoint at ``path`` is replaced.

    Returns:
        The folder.

    Raises:
        ExistsError: ``path`` exists, or holds files that are not of a checkpoint.
        UnsupportedError: ``params`` holds something that cannot be saved.
        WriteError: the disk is full, or not writable.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxq.checkpoints import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/model", {"w": jnp.ones((2, 2))})
        ...     load(f"{folder}/model")["w"].shape
        (2, 2)
    """
    target = Path(path)
    store = lookup(BACKENDS, backend, "backend")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1")
    structure.flatten(params)  # refuses what is no tree before anything walks it
    params = canonical_params(params)
    leaves = structure.flatten(params)
    extras = extra_writers(config, extra_files or {})
    described = manifest.Manifest(
        backend=backend,
        tree=structure.describe(params),
        params={p: parameter.abstract(p, leaf) for p, leaf in leaves.items()},
        extra_files=tuple(extras),
        recipe=manifest.plain_data(recipe, "recipe"),
        metadata=manifest.plain_data(dict(metadata or {}), "metadata"),
    )
    arrays = arrays_of(leaves)
    needed = sum(array.nbytes for array in arrays.values())
    replace = may_replace if overwrite else None
    with atomic.new_folder(target, needed, replace) as folder:
        files = store.write(folder, described, arrays, shard_bytes)
        for name, write in extras.items():
            write(folder / name)
        manifest.write(folder, dataclasses.replace(described, files=files))
    return target


def arrays_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return every array by name, all of which must have numbers."""
    arrays: dict[str, Any] = {}
    for path, leaf in leaves.items():
        for name, array in parameter.tensors(path, leaf):
            if isinstance(array, jax.ShapeDtypeStruct):
                raise UnsupportedError(
                    f"{name!r} is abstract: it has no numbers to save"
                )
            if isinstance(array, jax.Array) and array.is_deleted():
                raise UnsupportedError(
                    f"{name!r} was deleted (donated to a jitted function); save before"
                )
            if name in arrays:
                raise UnsupportedError(
                    f"two arrays would be stored as {name!r}; rename a key of the tree"
                )
            arrays[name] = np.asarray(array) if isinstance(array, np.generic) else array
    return arrays


def extra_writers(
    config: Any, extra_files: Mapping[str, Content]
) -> dict[str, Callable[[Path], object]]:
    """Return what writes each further file."""
    extras: dict[str, Callable[[Path], object]] = {}
    if config is not None:
        text = json.dumps(manifest.plain_data(config, "config"), indent=2) + "\n"
        extras[CONFIG] = _writer(CONFIG, text)
    taken = {manifest.NAME, shards.INDEX, *extras}
    for name, content in extra_files.items():
        clash = name in taken or name.endswith(".safetensors")
        if clash or not manifest.is_plain_name(name):
            raise UnsupportedError(
                f"extra_files has {name!r}: give a plain file name (letters, digits, "
                f"'_', '-', '.') other than *.safetensors, {', '.join(sorted(taken))}"
            )
        extras[name] = _writer(name, content)
    return extras


def _writer(name: str, content: Content) -> Callable[[Path], object]:
    if isinstance(content, str):
        return lambda path: path.write_text(content, "utf-8")
    if isinstance(content, bytes):
        return lambda path: path.write_bytes(content)
    source = Path(content)
    if not source.is_file():
        raise MissingFileError(
            f"extra_files names {source} for {name!r}; it is no file"
        )
    return lambda path: shutil.copyfile(source, path)


def may_replace(target: Path) -> None:
    """Raise unless ``target`` is a checkpoint, and nothing else is lost with it."""
    try:
        old = manifest.read(target)
    except CheckpointError as error:
        raise ExistsError(
            f"{target} exists and is no intact checkpoint, so it is not overwritten; "
            f"remove it yourself, or save elsewhere ({error})"
        ) from error
    ours = {manifest.NAME, shards.INDEX, *old.files, *old.extra_files}
    found = (p for p in target.rglob("*") if not p.is_dir() or p.is_symlink())
    foreign = sorted({p.relative_to(target).as_posix() for p in found} - ours)
    if foreign:
        raise ExistsError(
            f"{target} also holds {', '.join(foreign[:3])}, which overwriting would "
            "lose; move them away, or save elsewhere"
        )
