"""Read a checkpoint, quantized or not, into a tree of arrays and `QTensor`s."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.huggingface import Slot, read_config, read_json
from jaxq.checkpoints.strict_json import shorten
from jaxq.codecs.base import Dense, Reader
from jaxq.codecs.gguf import GGUFReader, open_gguf
from jaxq.codecs.source import DTYPES, FLOATS, SafetensorsSource, Source
from jaxq.codecs.table import codec_of
from jaxq.heap import one_at_a_time
from jaxq.qtensor import QTensor

# How a note begins of a tensor that was quantized and is read as floats.
LOST = "dequantized: "
# Where a config lies that `config.json` does not hold, and whose it then is.
CONFIG_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "auto-round",
    "hf_quant_config.json": "modelopt",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: headers were read, numbers were not.

    Attributes:
        source: its tensors.
        reader: of its quantized weights, or None when it is float.
        codec: the name of its format; ``"float"`` when it is float.
        where: folder or file, for messages.
    """

    source: Source
    reader: Reader | None
    codec: str
    where: str

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the tensors that a quantized weight is made of; () if it is float."""
        module, dot, leaf = name.rpartition(".")
        if self.reader is None or not dot or leaf != "weight":
            return ()
        return self.reader.parts(module)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, or a quantized weight in its place."""
        return isinstance(name, str) and (name in self.source or bool(self.parts(name)))

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors that are there."""
        return iter(self.source)

    def __len__(self) -> int:
        """How many tensors are there."""
        return sum(1 for _ in self.source)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter that was read.

    Attributes:
        name: in the checkpoint.
        slot: where it goes.
        value: an array or a `QTensor`.
        note: what was lost or left out; empty: nothing.
    """

    name: str
    slot: Slot
    value: Any
    note: str


def open_model(path: Path) -> tuple[dict[str, Any], Checkpoint]:
    """Return the config and the open checkpoint of a folder, or of a GGUF file.

    A folder that holds no safetensors may hold one GGUF file; a `config.json` beside it
    has the word. Where the head has tensors of its own it is not tied, whatever the
    config says.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: a file is damaged.
        UnsupportedError: the format is not known.
    """
    file = find_gguf(path)
    if file is None:
        config = read_config(path)
        checkpoint = open_checkpoint(path, config)
    else:
        beside = (file.parent / "config.json").is_file()
        source, config = open_gguf(file, read_config(file.parent) if beside else None)
        checkpoint = Checkpoint(source, GGUFReader(source), "gguf", str(file))
    own_head = checkpoint.codec != "float" and "lm_head.weight" in checkpoint
    if own_head and config.get("tie_word_embeddings"):
        config = {**config, "tie_word_embeddings": False}
    return config, checkpoint


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path means, if it means one.

    Raises:
        CheckpointError: the folder holds several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{path} holds {len(files)} GGUF files; name one, such as {files[0]}"
        )
    return files[0] if files else None


def find_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a folder; None when it is float.

    Raises:
        CheckpointError: it is damaged.
    """
    said = config.get("quantization_config")
    if said is not None:
        if not isinstance(said, dict):
            raise CheckpointError(
                f"config.json: quantization_config is {shorten(said)}, not an object"
            )
        return said or None
    for name, method in CONFIG_FILES.items():
        if (folder / name).is_file():
            found = read_json(folder / name)
            inner = found.get("quantization", found)
            if isinstance(inner, dict):
                return {"quant_method": method, **inner}
    return None


def open_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Open the safetensors of a folder whose parsed ``config.json`` is given.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        CheckpointError: a file or the quantization config is damaged.
        UnsupportedError: the format is not known.
    """
    source = SafetensorsSource.of(folder)
    found = find_config(folder, config)
    if found is None and any(name.endswith(".W_q") for name in source):
        found = {"quant_method": "hqq"}
    if found is None:
        return Checkpoint(source, None, "float", str(folder))
    codec = codec_of(found)
    return Checkpoint(source, codec.read(found, source), codec.name, str(folder))


def read_leaves(
    checkpoint: Checkpoint,
    slots: Mapping[str, Slot],
    dtype: Any = None,
    ignore: tuple[str, ...] = (),
) -> Iterator[Leaf]:
    """Yield every parameter of a checkpoint, one at a time.

    Args:
        checkpoint: an open one.
        slots: every tensor of the float model by its name, and where it goes.
        dtype: of float parameters, and of what quantized ones stand for; None keeps
            the checkpoint's.
        ignore: endings of names that may be there and are not read.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or does not fit its slot.
    """
    check_names(checkpoint, slots, ignore)
    usual = _model_dtype(checkpoint, slots)

    def read(name: str, slot: Slot) -> tuple[Any, str]:
        if not checkpoint.parts(name):
            return _float(checkpoint, name, slot, dtype), ""
        value, note = read_weight(checkpoint, name, slot, usual)
        return value if dtype is None else _retyped(value, dtype), note

    found = one_at_a_time(read(name, slot) for name, slot in slots.items())
    for (name, slot), (value, note) in zip(slots.items(), found, strict=True):
        yield Leaf(name, slot, value, note)


def read_params(
    checkpoint: Checkpoint,
    slots: Mapping[str, Slot],
    dtype: Any = None,
    ignore: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return all parameters as nested dicts, and what was lost of which tensor.

    Args:
        checkpoint: an open one.
        slots: see `read_leaves`.
        dtype: see `read_leaves`.
        ignore: see `read_leaves`.
    """
    tree: dict[str, Any] = {}
    stacks: dict[tuple[str, ...], dict[int, Any]] = {}
    notes = dict(unused_notes(checkpoint, slots))
    for leaf in read_leaves(checkpoint, slots, dtype, ignore):
        if leaf.note:
            notes[leaf.name] = leaf.note
        if leaf.slot.place is None:
            _place(tree, leaf.slot.path, leaf.value)
        else:
            stacks.setdefault(leaf.slot.path, {})[leaf.slot.place] = leaf.value
    for path, parts in stacks.items():
        value, note = _stacked([parts[place] for place in sorted(parts)])
        if note:
            notes["/".join(path)] = note
        _place(tree, path, value)
    return tree, notes


def _stacked(parts: list[Any]) -> tuple[Any, str]:
    """Return tensors as one with a leading axis; as floats where they differ."""
    kinds = {str(jax.tree.structure(part)) for part in parts}
    note = ""
    if len(kinds) > 1:
        note = f"{LOST}what it stacks is quantized in different ways"
        parts = [p.dequantize() if isinstance(p, QTensor) else p for p in parts]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts), note


def read_weight(
    checkpoint: Checkpoint, name: str, slot: Slot, usual: Any
) -> tuple[Any, str]:
    """Return one quantized weight, and what of it was lost."""
    if checkpoint.reader is None or len(slot.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.where}: {name!r} is quantized, but it is no matrix"
        )
    # A checkpoint's matrices are [out, in], unless the model says otherwise.
    is_kernel = slot.transposed or slot.path[-1] == "kernel"
    swapped = is_kernel and not slot.transposed
    shape = slot.shape[::-1] if swapped else slot.shape
    found = checkpoint.reader.read(name.removesuffix(".weight"), shape)
    if isinstance(found, Dense):
        values = found.values.T if is_kernel else found.values
        return jnp.asarray(np.ascontiguousarray(values)), f"{LOST}{found.why}"
    if found.dtype is None:
        found = dataclasses.replace(found, dtype=usual)
    return found.tensor(transposed=not is_kernel), found.note


def check_names(
    checkpoint: Checkpoint, slots: Mapping[str, Slot], ignore: tuple[str, ...]
) -> None:
    """Raise `CheckpointError` unless every tensor has a use, and every use a tensor."""
    missing = sorted(name for name in slots if name not in checkpoint)
    if checkpoint.codec not in ("float", "gguf") and not any(
        map(checkpoint.parts, slots)
    ):
        raise CheckpointError(
            f"{checkpoint.where}: its config says that it is in the format "
            f"{checkpoint.codec}, but none of its weights is; fetch config and weights "
            "again"
        )
    used = {part for name in slots for part in checkpoint.parts(name) or (name,)}
    unused = checkpoint.reader.unused() if checkpoint.reader else {}
    endings = (*ignore, *(f".{ending}" for ending in unused))
    extra = sorted(
        name
        for name in checkpoint.source
        if not (name in used or name.endswith(endings))
    )
    if missing:
        raise CheckpointError(
            f"{checkpoint.where} lacks {_some(missing)} that its config.json asks for; "
            "the checkpoint is incomplete, or its config is another model's"
        )
    if extra:
        raise CheckpointError(
            f"{checkpoint.where} holds {_some(extra)} that its config.json has no use "
            "for; leaving them out would compute something else. Is it the right "
            "config?"
        )


def unused_notes(
    checkpoint: Checkpoint, slots: Mapping[str, Slot]
) -> Mapping[str, str]:
    """Return the tensors that are known and not read, and why."""
    used = {part for name in slots for part in checkpoint.parts(name) or (name,)}
    endings = checkpoint.reader.unused() if checkpoint.reader else {}
    return {
        name: why
        for name in checkpoint.source
        if name not in used
        for ending, why in endings.items()
        if name.endswith(f".{ending}")
    }


def _place(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    *branches, last = path
    for key in branches:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _some(names: list[str]) -> str:
    """Return a few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor(s), {', '.join(names[:3])}{more},"


def _float(checkpoint: Checkpoint, name: str, slot: Slot, dtype: Any) -> Any:
    source = checkpoint.source
    found, shape = source.entry(name)
    if found not in FLOATS:
        raise CheckpointError(
            f"{source.where(name)} is {found} without the scales of a quantized "
            f"weight; it should be one of {', '.join(FLOATS)}"
        )
    if shape != slot.shape:
        raise CheckpointError(
            f"{source.where(name)} is {shape}, but config.json makes it {slot.shape}; "
            "config and weights belong to different models"
        )
    values = source.read(name)
    values = values.T if slot.transposed else values
    wanted = values.dtype if dtype is None else jnp.dtype(dtype)
    return jnp.asarray(np.ascontiguousarray(values, wanted))


def _retyped(value: Any, dtype: Any) -> Any:
    if isinstance(value, QTensor):
        return dataclasses.replace(value, dtype=jnp.dtype(dtype))
    return value.astype(dtype)


def _model_dtype(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> Any:
    """Return the dtype of the largest float parameter: the model's."""
    entries = [
        checkpoint.source.entry(name)
        for name in slots
        if name in checkpoint.source and not checkpoint.parts(name)
    ]
    floats = [e for e in entries if e[0] in FLOATS]
    largest = max(floats, key=lambda e: int(np.prod(e[1])), default=("F32", ()))
    return DTYPES[largest[0]]
