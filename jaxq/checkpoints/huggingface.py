"""Float checkpoints as Hugging Face lays them out: config.json beside safetensors.

Tensors are read one at a time into their place, so a model is never held twice, or
when their numbers are asked for, so it is never held at all. Which tensor goes where is
the caller's knowledge (`Slot`): no architecture is known here.
Pickled weights are never opened: unpickling runs whatever the file says.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.lazy import FLOATS, LazyArray, LazyStack
from jaxq.checkpoints.safetensors import Header, read_header
from jaxq.heap import one_at_a_time

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5 * 10**9


class Slot(Protocol):
    """Where one tensor of a checkpoint goes in a tree of parameters."""

    @property
    def path(self) -> tuple[str, ...]:
        """Keys from the root of the tree to the leaf."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""

    @property
    def transposed(self) -> bool:
        """Whether the leaf is the tensor transposed."""

    @property
    def place(self) -> int | None:
        """The tensor's place in a leaf that stacks several; None for a leaf of its own.

        Several slots then have the same path, and the places 0, 1, 2 ...
        """


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        FileNotFoundError: there is no such folder, or no `config.json` in it.
        CheckpointError: it is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; name the folder that holds a model's config.json"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json, so it is no Hugging Face model folder"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return parsed


def read_tensors(
    folder: str | Path,
    slots: Mapping[str, Slot],
    dtype: Any = None,
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read a checkpoint into a tree of arrays.

    Args:
        folder: holds `model.safetensors`, or shards and their index.
        slots: every tensor to read by its name in the checkpoint, and where it goes.
        dtype: what to convert to; None keeps each tensor's own.
        ignore: endings of names that may be there and are not read.

    Returns:
        Nested dicts by the paths of `slots`.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        CheckpointError: a file is damaged, a tensor is missing, unexpected, of another
            shape than its slot or no float.
    """
    tree: dict[str, Any] = {}
    leaves = _lazy_leaves(folder, slots, dtype, ignore)
    read = ((path, jnp.asarray(leaf.read())) for path, leaf in leaves)
    for path, array in one_at_a_time(read):
        _place(tree, path, array)
    return tree


def lazy_tensors(
    folder: str | Path,
    slots: Mapping[str, Slot],
    dtype: Any = None,
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return what `read_tensors` does, with `LazyArray`s in place of arrays.

    Only headers are read: names, shapes, dtypes and the sizes of all files are checked
    now, and each tensor's numbers are read when its leaf is asked for them.

    Args:
        folder: holds `model.safetensors`, or shards and their index.
        slots: every tensor by its name in the checkpoint, and where it goes.
        dtype: what to convert to; None keeps each tensor's own.
        ignore: endings of names that may be there and are not read.

    Returns:
        Nested dicts by the paths of `slots`.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        CheckpointError: a file is damaged, a tensor is missing, unexpected, of another
            shape than its slot or no float.
    """
    tree: dict[str, Any] = {}
    for path, leaf in _lazy_leaves(folder, slots, dtype, ignore):
        _place(tree, path, leaf)
    return tree


def locate(folder: str | Path) -> dict[str, Header]:
    """Return the header of the file that holds each tensor of a checkpoint.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        CheckpointError: a file is damaged, or the index does not agree with the shards.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        header = read_header(folder / SINGLE)
        return dict.fromkeys(header.entries, header)
    if not (folder / INDEX).is_file():
        raise _nothing_to_read(folder)
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{folder / INDEX} has no 'weight_map'; fetch the file again"
        )
    if odd := [shard for shard in listed.values() if not isinstance(shard, str)]:
        raise CheckpointError(
            f"{folder / INDEX} names {odd[0]!r}, which is not a plain file name"
        )
    headers = {shard: _shard(folder, shard) for shard in sorted(set(listed.values()))}
    for name, shard in listed.items():
        if name not in headers[shard].entries:
            raise CheckpointError(
                f"{folder / shard} does not hold {name!r}, which {INDEX} says it does; "
                "fetch the shard again"
            )
    return {name: headers[shard] for name, shard in listed.items()}


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    slots: Mapping[str, Slot],
    params: Mapping[str, Any],
    dtype: Any = None,
    extra: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a float model as a Hugging Face folder that transformers can load.

    Each file is written beside its place and renamed into it, the config last, so an
    interrupted write leaves no folder that looks complete. Only one shard is copied at
    a time.

    Args:
        folder: made where it is missing; files of the same name are replaced.
        config: what goes into `config.json`.
        slots: the checkpoint's tensors, as for `read_tensors`.
        params: the tree that `slots` point into.
        dtype: what to convert to; None keeps each tensor's own.
        extra: the text of further files, such as `tokenizer.json`, by name.
        shard_bytes: a file holds no more than this, unless one tensor does.

    Raises:
        CheckpointError: `params` lacks a leaf, or one has another shape than its slot.
        OSError: the disk is full or not writable; nothing half-written keeps its name.
    """
    folder = Path(folder)
    leaves = {name: _leaf(params, name, slot) for name, slot in slots.items()}
    shards = _split(leaves, dtype, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
    for shard, names_of_shard in zip(names, shards, strict=True):
        tensors = {n: _to_numpy(leaves[n], slots[n], dtype) for n in names_of_shard}
        with _replacing(folder / shard) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_index(folder, dict(zip(names, shards, strict=True)))
    # What an earlier model left would be read in place of this one.
    (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)
    for name, text in (extra or {}).items():
        with _replacing(folder / name) as partial:
            partial.write_text(text, "utf-8")
    with _replacing(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to; rename it to `path` once that went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors would make it readable by us alone
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _shard(folder: Path, shard: str) -> Header:
    if Path(shard).name != shard:
        raise CheckpointError(
            f"{folder / INDEX} names {shard!r}, which is not a plain file name"
        )
    if not (folder / shard).is_file():
        raise FileNotFoundError(
            f"{folder} lacks the shard {shard} that {INDEX} lists; fetch it again"
        )
    return read_header(folder / shard)


def _lazy_leaves(
    folder: str | Path, slots: Mapping[str, Slot], dtype: Any, ignore: tuple[str, ...]
) -> list[tuple[tuple[str, ...], LazyArray | LazyStack]]:
    """Return path and tensors of every leaf, all of them checked."""
    headers = locate(folder)
    _compare_names(Path(folder), set(headers), set(slots), ignore)
    leaves: dict[tuple[str, ...], LazyArray | LazyStack] = {}
    stacks: dict[tuple[str, ...], dict[int, LazyArray]] = {}
    for name, slot in slots.items():
        tensor = _lazy(headers[name], name, slot, dtype)
        if slot.place is None:
            leaves[slot.path] = tensor
        else:
            stacks.setdefault(slot.path, {})[slot.place] = tensor
    for path, parts in stacks.items():
        leaves[path] = LazyStack(tuple(parts[place] for place in sorted(parts)))
        if len({part.dtype for part in parts.values()}) > 1:
            raise CheckpointError(
                f"{folder}: the tensors that {'/'.join(path)} stacks have different "
                "dtypes; give a dtype to convert them to"
            )
    return list(leaves.items())


def _lazy(header: Header, name: str, slot: Slot, dtype: Any) -> LazyArray:
    entry = header.entries[name]
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{header.path}: {name!r} is {entry.dtype}, but a float checkpoint holds "
            f"{', '.join(sorted(FLOATS))}; is this model already quantized?"
        )
    if entry.shape != slot.shape:
        raise CheckpointError(
            f"{header.path}: {name!r} is {entry.shape}, but config.json makes it "
            f"{slot.shape}; config and weights belong to different models"
        )
    return LazyArray.of(header, name, dtype, slot.transposed)


def _leaf(params: Mapping[str, Any], name: str, slot: Slot) -> Any:
    leaf: Any = params
    for key in slot.path:
        if not isinstance(leaf, Mapping) or key not in leaf:
            raise CheckpointError(
                f"params has no {'/'.join(slot.path)}, to be written as {name!r}"
            )
        leaf = leaf[key]
    if slot.place is not None:
        leaf = leaf[slot.place]
    shape = leaf.shape[::-1] if slot.transposed else leaf.shape
    if shape != slot.shape:
        raise CheckpointError(
            f"params[{'/'.join(slot.path)}] would be written as {name!r} of shape "
            f"{shape}, but the config makes it {slot.shape}"
        )
    return leaf


def _to_numpy(leaf: Any, slot: Slot, dtype: Any) -> np.ndarray:
    array = np.asarray(leaf)
    wanted = array.dtype if dtype is None else jnp.dtype(dtype)
    return np.ascontiguousarray(array.T if slot.transposed else array, dtype=wanted)


def _split(leaves: Mapping[str, Any], dtype: Any, limit: int) -> list[list[str]]:
    """Group names, in order, into shards of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, leaf in leaves.items():
        size = leaf.size * jnp.dtype(leaf.dtype if dtype is None else dtype).itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _write_index(folder: Path, shards: Mapping[str, list[str]]) -> None:
    listed = {name: shard for shard, names in shards.items() for name in names}
    total = sum((folder / shard).stat().st_size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    with _replacing(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _place(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    *branches, last = path
    for key in branches:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _compare_names(
    folder: Path, held: set[str], wanted: set[str], ignore: tuple[str, ...]
) -> None:
    missing = sorted(wanted - held)
    extra = sorted(name for name in held - wanted if not name.endswith(ignore))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_some(missing)} that its config.json asks for; the "
            "checkpoint is incomplete, or its config is another model's"
        )
    if extra:
        raise CheckpointError(
            f"{folder} holds {_some(extra)} that its config.json has no use for; "
            "leaving them out would compute something else. Is it the right config?"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor(s), {', '.join(names[:3])}{more},"


def _nothing_to_read(folder: Path) -> FileNotFoundError:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        return FileNotFoundError(
            f"{folder} holds its weights as pickles only ({', '.join(pickles[:3])}), "
            "which can run any code when opened; convert them to safetensors first, "
            "for instance with model.save_pretrained of transformers"
        )
    stray = sorted(p.name for p in folder.glob("*.safetensors"))
    if stray:
        return FileNotFoundError(
            f"{folder} holds {', '.join(stray[:3])} but neither {SINGLE} nor {INDEX}; "
            "fetch the index as well"
        )
    return FileNotFoundError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; fetch the weights"
    )
