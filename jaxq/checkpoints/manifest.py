"""`jaxq.json`: what a checkpoint folder holds, in full but for the numbers."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxq.checkpoints import parameter, strict_json, structure
from jaxq.checkpoints.errors import (
    CorruptError,
    MissingFileError,
    UnsupportedError,
    VersionError,
)

NAME = "jaxq.json"
FORMAT = "jaxq"
VERSION = 1
BACKENDS = ("safetensors", "orbax")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """How many bytes a file has, and their SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        backend: how the numbers are stored, ``"safetensors"`` or ``"orbax"``.
        tree: the structure of the parameters, see `structure`.
        params: every parameter by path, with shapes and dtypes in place of arrays.
        files: the files that hold the numbers, by name.
        extra_files: the names of further files (config.json, a tokenizer).
        recipe: how it was quantized, as plain data, or None.
        metadata: whatever the writer wanted to say, as plain data.
        written_by: the program and its version.
    """

    backend: str
    tree: structure.Node
    params: Mapping[str, parameter.Abstract]
    files: Mapping[str, DataFile] = dataclasses.field(default_factory=dict)
    extra_files: tuple[str, ...] = ()
    recipe: Any = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    written_by: str = ""

    def tensors(self) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
        """Yield every stored array, abstract, by name."""
        for path, leaf in self.params.items():
            yield from parameter.tensors(path, leaf)


def write(folder: Path, manifest: Manifest) -> None:
    """Write `jaxq.json` into ``folder``."""
    content = {
        "format": FORMAT,
        "format_version": VERSION,
        "written_by": program(),
        "backend": manifest.backend,
        "files": {k: dataclasses.asdict(f) for k, f in manifest.files.items()},
        "extra_files": list(manifest.extra_files),
        "recipe": manifest.recipe,
        "metadata": manifest.metadata,
        "tree": manifest.tree,
        "parameters": {p: parameter.to_dict(a) for p, a in manifest.params.items()},
    }
    content["sha256"] = digest(content)
    (folder / NAME).write_text(_render(content), "utf-8")


def read(folder: str | Path) -> Manifest:
    """Read and check the `jaxq.json` of a checkpoint; no tensor is touched.

    Raises:
        MissingFileError: there is no such folder, or it is no jaxq checkpoint.
        VersionError: a newer jaxq wrote it.
        CorruptError: it is damaged or contradicts itself.
    """
    path = Path(folder) / NAME
    data = _read_bytes(path)
    content = strict_json.parse(data, str(path))
    _check_version(content, path)
    try:
        found = digest(content)
        manifest = _parse(content, str(path))
    except RecursionError as error:
        raise CorruptError(f"{path} nests too deep; fetch or save it again") from error
    if content.get("sha256") != found:
        raise CorruptError(
            f"{path} was altered after it was written: its sha256 is {found}, but it "
            f"says {strict_json.shorten(content.get('sha256'))}; fetch or save it again"
        )
    return manifest


def is_jaxq_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a folder that `jaxq.save` wrote (damaged or not)."""
    try:
        return b'"jaxq"' in (Path(path) / NAME).read_bytes()[:200]
    except OSError:
        return False


def plain_data(value: Any, what: str) -> Any:
    """Return ``value`` as JSON will give it back; what has ``to_dict`` is asked for it.

    Raises:
        UnsupportedError: naming ``what`` is no plain data.
    """
    value = value.to_dict() if hasattr(value, "to_dict") else value
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedError(
            f"{what} must be plain data (dict, list, str, finite number, bool, None), "
            f"so that it can be saved as JSON: {error}"
        ) from error


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is a file name that stays in its folder, on every system."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        folder = path.parent
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise MissingFileError(
                f"{folder} {what}; name the folder that jaxq.save wrote"
            ) from error
        hint = "name the folder that jaxq.save wrote"
        if (folder / "config.json").exists():
            hint = "it looks like a model of another library: use jaxq.load_model"
        raise MissingFileError(f"{folder} holds no {NAME}; {hint}") from error


def _check_version(content: Mapping[str, Any], path: Path) -> None:
    where = str(path)
    if strict_json.get(content, "format", str, where) != FORMAT:
        raise CorruptError(f"{path} says format {content['format']!a}, not {FORMAT!r}")
    version = strict_json.get(content, "format_version", int, where)
    if version > VERSION:
        by = strict_json.shorten(content.get("written_by", "an unknown program"))
        raise VersionError(
            f"{path} is of format version {version}, written by {by}; this jaxq reads "
            f"up to version {VERSION}: pip install --upgrade jaxq"
        )
    if version < 1:
        raise CorruptError(f"{path} says format version {version}; they start at 1")


def _parse(content: Mapping[str, Any], where: str) -> Manifest:
    get = strict_json.get
    backend = get(content, "backend", str, where)
    if backend not in BACKENDS:
        raise CorruptError(
            f"{where}: backend {strict_json.shorten(backend)} is none of "
            f"{', '.join(BACKENDS)}"
        )
    params = {
        path: parameter.from_dict(
            as_object(data, f"{where}: parameter {path!a}"),
            f"{where}: parameter {path!a}",
        )
        for path, data in get(content, "parameters", dict, where).items()
    }
    extra_files = tuple(get(content, "extra_files", list, where))
    for name in extra_files:
        _check_name(name, where, parts=1)
    manifest = Manifest(
        backend=backend,
        tree=content.get("tree"),
        params=params,
        files=dict(read_files(get(content, "files", dict, where), where)),
        extra_files=extra_files,
        recipe=content.get("recipe"),
        metadata=get(content, "metadata", dict, where),
        written_by=get(content, "written_by", str, where),
    )
    _check_names(manifest, where)
    return manifest


def _check_names(manifest: Manifest, where: str) -> None:
    """Raise unless tree and parameters name the same, and no tensor twice."""
    paths = structure.leaf_paths(manifest.tree, where)
    if sorted(paths) != sorted(manifest.params):
        odd = sorted(set(paths) ^ set(manifest.params)) or sorted(paths)
        raise CorruptError(
            f"{where}: tree and parameters differ in {strict_json.shorten(odd[:3])}"
        )
    names = [name for name, _ in manifest.tensors()]
    if len(set(names)) != len(names):
        raise CorruptError(f"{where}: two parameters share the name of a tensor")


def read_files(files: Mapping[str, Any], where: str) -> Iterator[tuple[str, DataFile]]:
    """Yield files by name from ``{name: {"bytes": ..., "sha256": ...}}``.

    Raises:
        CorruptError: it is something else, or a name leads out of the folder.
    """
    for name, data in files.items():
        _check_name(name, where, parts=8)
        data = as_object(data, f"{where}: file {name!r}")
        size = strict_json.get(data, "bytes", int, f"{where}: file {name!r}")
        digest = strict_json.get(data, "sha256", str, f"{where}: file {name!r}")
        if not _SHA256.fullmatch(digest):
            raise CorruptError(
                f"{where}: file {name!r} has the sha256 {strict_json.shorten(digest)}, "
                "which is none"
            )
        yield name, DataFile(size, digest)


def _check_name(name: object, where: str, parts: int) -> None:
    """Raise unless ``name`` is a relative path without ways out of the folder."""
    pieces = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(pieces) <= parts or not all(map(is_plain_name, pieces)):
        raise CorruptError(
            f"{where} names the file {strict_json.shorten(name)}, which is no plain "
            "name inside the folder; do not trust this checkpoint"
        )


def as_object(data: Any, where: str) -> Mapping[str, Any]:
    """Return ``data``; raise `CorruptError` unless it is a JSON object."""
    if not isinstance(data, dict):
        raise CorruptError(f"{where} is {strict_json.shorten(data)}, not an object")
    return data


def _render(content: Mapping[str, Any]) -> str:
    """Return JSON to be read by people too: one line for each parameter and file."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if key in ("files", "parameters") and value:
            entries = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(entries) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything but itself, whatever the white space."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def program() -> str:
    """Return this program and its version."""
    try:
        return f"jaxq {importlib.metadata.version('jaxq')}"
    except importlib.metadata.PackageNotFoundError:
        return "jaxq"
