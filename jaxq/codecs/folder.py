"""Write a checkpoint's folder tensor by tensor: shards, index, config, side files."""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import is_jaxq_checkpoint, safetensors, saving
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
SPOOL = "data.partial"
HEAD = "lm_head"


class Shards:
    """Collects tensors and writes a file whenever enough came together.

    One tensor is in memory. The others wait in a file, since a shard's header comes
    first and says what is in it. Shards get their names at the end, when it is known
    how many there are.

    Args:
        folder: an empty one.
        limit: bytes of a shard; a larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, jax.ShapeDtypeStruct] = {}
        self.starts: dict[str, int] = {}
        self.files: list[dict[str, int]] = []
        self.spool = (folder / SPOOL).open("wb+")

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take some tensors, and write those before if they do not fit together."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.held and self.spool.tell() + size > self.limit:
            self._write()
        for name, tensor in tensors.items():
            self.held[name] = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            self.starts[name] = self.spool.tell()
            self.spool.write(_bytes(np.ascontiguousarray(tensor)))

    def close(self, writer: Writer | None = None) -> None:
        """Write what is left, name the files and, if there are several, the index.

        Args:
            writer: of the quantized layers, which knows them all now.
        """
        self._write()
        self.release()
        (self.folder / SPOOL).unlink()
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

    def release(self) -> None:
        """Let go of what is open, whatever happened; more than once if need be."""
        with contextlib.suppress(OSError):  # a full disk was told of already
            self.spool.close()

    def _write(self) -> None:
        path = self.folder / _partial(len(self.files))
        safetensors.write(path, self.held, self._fetch, METADATA)
        sizes = {n: t.size * t.dtype.itemsize for n, t in self.held.items()}
        self.files.append(sizes)
        self.held, self.starts = {}, {}
        self.spool.seek(0)
        self.spool.truncate()

    def _fetch(self, name: str) -> np.ndarray:
        tensor = self.held[name]
        out = np.empty(tensor.shape, tensor.dtype)
        self.spool.seek(self.starts[name])
        if self.spool.readinto(_bytes(out)) != out.nbytes:
            raise OSError(f"{self.folder / SPOOL} lost what was written to it")
        return out


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


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
    if is_jaxq_checkpoint(target):
        saving.may_replace(target)
        return
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
        self.head_is_float = True
        self.shards = Shards(folder, limit)

    def quantized(self, module: str, w: Unpacked) -> str:
        """Write a quantized layer; return a note.

        Raises:
            UnsupportedError: the format cannot express it.
        """
        if self.writer is None:
            raise UnsupportedError("a float model has no codes")
        tensors, note = self.writer.write(module, w)
        self.head_is_float &= module != HEAD
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

    def release(self) -> None:
        """Let go of what is open."""
        self.shards.release()

    def close(self, config: Mapping[str, Any]) -> None:
        """Write what is left, the index and the config."""
        if self.writer is not None and self.head_is_float:
            # Also where it is tied, or has another name in the file than in an engine,
            # which would look for its codes.
            self.writer.floats = sorted({*self.writer.floats, HEAD})
        self.shards.close(self.writer)
        about = {} if self.writer is None else {
            "quantization_config": self.writer.config()
        }  # fmt: skip
        write_config(self.folder, {**config, **about})
