"""Write a checkpoint's folder tensor by tensor: shards, index, config, side files."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import safetensors
from jaxq.checkpoints.errors import ExistsError, UnsupportedError
from jaxq.checkpoints.huggingface import INDEX, SINGLE
from jaxq.codecs.base import Writer
from jaxq.codecs.source import SafetensorsSource
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec

# What belongs to a model besides weights and config, and is carried over as it is.
SIDE_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
METADATA = {"format": "pt"}  # transformers asks for it


class Shards:
    """Collects tensors and writes a file whenever enough came together.

    Only one shard's tensors are in memory. The files get their names at the end, when
    it is known how many there are.

    Args:
        folder: an empty one.
        limit: bytes of a shard; a larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, np.ndarray] = {}
        self.bytes = 0
        self.files: list[dict[str, int]] = []

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take some tensors, and write those before if they do not fit together."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.held and self.bytes + size > self.limit:
            self._write()
        self.held |= tensors
        self.bytes += size

    def close(self, writer: Writer | None = None) -> None:
        """Write what is left, name the files and, if there are several, the index.

        Args:
            writer: of the quantized layers, which knows them all now.
        """
        self._write()
        if writer is not None:
            for i, names in enumerate(self.files):
                late = [name for name in names if name.endswith(writer.late)]
                rewrite(self.folder / _partial(i), late, writer.finish)
        count, where = len(self.files), {}
        for i, names in enumerate(self.files):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors"
            name = name if count > 1 else SINGLE
            (self.folder / _partial(i)).rename(self.folder / name)
            where |= dict.fromkeys(names, name)
        if count > 1:
            total = sum(sum(names.values()) for names in self.files)
            index = {"metadata": {"total_size": total}, "weight_map": where}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, "utf-8")

    def _write(self) -> None:
        tensors = {
            name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            for name, tensor in self.held.items()
        }
        path = self.folder / _partial(len(self.files))
        safetensors.write(path, tensors, self.held.__getitem__, METADATA)
        self.files.append({name: t.nbytes for name, t in self.held.items()})
        self.held, self.bytes = {}, 0


def rewrite(
    path: Path, names: list[str], change: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    """Change the numbers of some tensors of a safetensors file where they lie."""
    if not names:
        return
    header = safetensors.read_header(path)
    source = SafetensorsSource(dict.fromkeys(names, header))
    with path.open("rb+") as file:
        for name in names:
            tensor = source.read(name)
            file.seek(header.start + header.entries[name].start)
            file.write(change(name, tensor).astype(tensor.dtype).tobytes())


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, "utf-8")


def carry_over(source: Path | None, files: Mapping[str, str], folder: Path) -> None:
    """Copy side files: those of the source's folder, and texts by name."""
    for name in SIDE_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
        elif name in files:
            (folder / name).write_text(files[name], "utf-8")


def may_replace(target: Path) -> None:
    """Raise `ExistsError` unless a folder holds a model and nothing else."""
    ours = {"config.json", INDEX, SINGLE, *SIDE_FILES}
    odd = sorted(
        path.name
        for path in target.iterdir()
        if path.is_dir()
        or not (path.name in ours or path.suffix in (".safetensors", ".gguf"))
    )
    if odd or not (target / "config.json").is_file():
        raise ExistsError(
            f"{target} exists and is no model's folder that was written here"
            f"{' (it holds ' + ', '.join(odd[:3]) + ')' if odd else ''}; remove it "
            "yourself, or write elsewhere"
        )


def _partial(number: int) -> str:
    return f"shard-{number + 1}.partial"


class SafetensorsSink:
    """Writes a model as safetensors, quantized as a writer does it, or float.

    Args:
        folder: an empty one.
        writer: of the quantized layers; None for a float model.
        limit: bytes of a shard.
    """

    def __init__(self, folder: Path, writer: Writer | None, limit: int) -> None:
        self.folder, self.writer = folder, writer
        self.shards = Shards(folder, limit)

    def quantized(self, module: str, w: Unpacked) -> str:
        """Write a quantized layer; return a note.

        Raises:
            UnsupportedError: the format cannot express it.
        """
        if self.writer is None:
            raise UnsupportedError("a float model has no codes")
        tensors, note = self.writer.write(module, w)
        self.shards.add(tensors)
        return note

    def floating(self, name: str, values: np.ndarray, is_layer: bool) -> None:
        """Write a float tensor, the weight of a layer or another."""
        if is_layer and self.writer is not None:
            self.writer.leave(name.removesuffix(".weight"))
        self.shards.add({name: np.ascontiguousarray(values)})

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize a layer with."""
        if self.writer is None:
            raise UnsupportedError("a float model has no codes")
        return self.writer.nearest(shape, dtype)

    def close(self, config: Mapping[str, Any]) -> None:
        """Write what is left, the index and the config."""
        self.shards.close(self.writer)
        about = {} if self.writer is None else {
            "quantization_config": self.writer.config()
        }  # fmt: skip
        write_config(self.folder, {**config, **about})
