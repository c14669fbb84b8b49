"""Files that are truncated, altered, missing or not what they say: clear errors."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxq.checkpoints import (
    CheckpointError,
    CorruptError,
    MismatchError,
    MissingFileError,
    VersionError,
    inspect,
    is_jaxq_checkpoint,
    load,
    save,
)
from jaxq.checkpoints.backends import BACKENDS
from tests.checkpoints.trees import reseal, variants

backends = pytest.mark.parametrize("backend", BACKENDS)
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tree = {"params": {"w": variants("int4")["double"], "b": jnp.ones(8)}}
    return save(tmp_path / "model", tree)


def check(folder: Path, error: type[CheckpointError], *words: str) -> None:
    """`load` raises that, and its message has these words; `inspect` too."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(error, match=re.escape(str(caught.value)[:60])):
        inspect(folder)


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, and its length accordingly."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    parsed = json.loads(data[8 : 8 + length])
    change(parsed)
    text = json.dumps(parsed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(folder, keep):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:keep])
    size = len(data[:keep])
    check(folder, CorruptError, FILE, "truncated", f"{size} bytes", f"{len(data)} were")
    reseal(folder)  # even if the manifest agrees
    check(folder, CorruptError, FILE, "truncated" if keep != 100 else "header")


def test_something_appended(folder):
    with (folder / FILE).open("ab") as file:
        file.write(b"more")
    check(folder, CorruptError, FILE, "altered", "fetch or save it again")
    reseal(folder)
    check(folder, CorruptError, FILE, "something appended")


@backends
def test_every_flipped_bit_is_noticed(tmp_path, backend, rng):
    tree = {"w": jnp.arange(64.0), "v": jnp.arange(32)}
    folder = save(tmp_path / "model", tree, backend=backend)
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    for path in files:
        data = path.read_bytes()
        for position in rng.integers(0, len(data), 6):
            bad = bytearray(data)
            bad[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            with pytest.raises(CheckpointError):
                load(folder)
        path.write_bytes(data)
    load(folder)


def test_verify_can_be_left_out(folder):
    """It costs a second pass over the file; sizes and headers are checked anyway."""
    path = folder / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="sha256"):
        load(folder)
    load(folder, verify=False)
    inspect(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match="truncated"):
        load(folder, verify=False)


@backends
def test_missing_file(tmp_path, backend):
    tree = {str(i): jnp.ones(1000) for i in range(4)}
    folder = save(tmp_path / "model", tree, backend=backend, shard_bytes=5000)
    name = max(json.loads((folder / "jaxq.json").read_text())["files"])
    (folder / name).unlink()
    check(
        folder, MissingFileError, "lacks", name.split("/")[-1], "fetch what is missing"
    )
    with pytest.raises(FileNotFoundError):
        load(folder)


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    check(tmp_path / "nowhere", MissingFileError, "nowhere does not exist")
    check(tmp_path / "empty", MissingFileError, "holds no jaxq.json")
    check(tmp_path / "other", MissingFileError, "use jaxq.load_model")
    check(tmp_path / "file", MissingFileError, "file is a file", "name the folder")
    for name in ("nowhere", "empty", "other", "file"):
        assert not is_jaxq_checkpoint(tmp_path / name)


def test_is_jaxq_checkpoint(folder):
    assert is_jaxq_checkpoint(folder)
    assert is_jaxq_checkpoint(str(folder))
    (folder / FILE).unlink()
    assert is_jaxq_checkpoint(folder), "damaged, but whose it is can be said"


# ------------------------------------------------------------------ headers


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (0, "no valid JSON"),
        (1, "no valid JSON"),
        (2**20, "is truncated or no safetensors file"),
        (2**40, "is truncated or no safetensors file"),
        (2**64 - 1, "is truncated or no safetensors file"),
    ],
)
def test_wrong_header_length(folder, length, words):
    path = folder / FILE
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    reseal(folder)
    check(folder, CorruptError, FILE, words, "fetch or save it again")


NAME = "params/b/"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], type, tuple[str, ...]]] = {
    "dtype": (
        lambda h: h["params/b"].update(dtype="I32"),
        MismatchError,
        ("params/b", "dtype I32", "says F32"),
    ),
    "shape": (
        lambda h: h["params/b"].update(shape=[4, 2]),
        MismatchError,
        ("params/b", "(4, 2)", "says (8,)"),
    ),
    "unknown dtype": (
        lambda h: h["params/b"].update(dtype="F31"),
        CorruptError,
        ("params/b", "F31"),
    ),
    "too small": (
        lambda h: h["params/b"].update(shape=[7]),
        CorruptError,
        ("params/b", "28 bytes", "data_offsets"),
    ),
    "negative": (
        lambda h: h["params/b"].update(shape=[-8]),
        CorruptError,
        ("params/b", "[-8]"),
    ),
    "overflow": (
        lambda h: h["params/b"].update(shape=[2**62] * 60),
        CorruptError,
        ("params/b", "bytes"),
    ),
    "rank": (
        lambda h: h["params/b"].update(shape=[2**62] * 300),
        CorruptError,
        ("params/b", "not a list of sizes"),
    ),
    "no shape": (lambda h: h["params/b"].pop("shape"), CorruptError, ("no 'shape'",)),
    "no object": (lambda h: h.update({"params/b": 3}), CorruptError, ("is 3",)),
    "renamed": (
        lambda h: h.update({"params/c": h.pop("params/b")}),
        MismatchError,
        ("params/c", "jaxq.json does not list"),
    ),
    "overlap": (
        lambda h: h.update({"params/c": h["params/b"]}),
        CorruptError,
        ("starts at byte",),
    ),
    "missing": (
        lambda h: h.pop("params/w/scales/codes"),
        CorruptError,
        ("need 816 bytes, and it holds 1008",),
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(folder, case):
    change, error, words = HEADERS[case]
    header(folder / FILE, change)
    reseal(folder)
    check(folder, error, FILE, *words)


def test_repeated_name(folder):
    """Readers disagree which of the two counts."""
    path = folder / FILE
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].replace(b"params/w/codes", b"params/b", 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    reseal(folder)
    check(folder, CorruptError, FILE, "a key is repeated")


@backends
def test_tensors_of_another_checkpoint(tmp_path, backend):
    """Whole and valid, but not the ones that the manifest describes."""
    for name, tree in {
        "one": {"a": jnp.ones(3), "b": jnp.ones(4)},
        "two": {"a": jnp.ones(3), "c": jnp.ones(4)},
        "wide": {"a": jnp.ones(3), "b": jnp.ones((2, 2))},
        "half": {"a": jnp.ones(3, "float16"), "b": jnp.ones(4)},
    }.items():
        save(tmp_path / name, tree, backend=backend)
    manifest = json.loads((tmp_path / "one" / "jaxq.json").read_text())
    for name, words in {
        "two": ("'c'",) if backend == "safetensors" else ("'b'",),
        "wide": ("'b'", "(2, 2)", "(4,)"),
        "half": ("'a'", "16", "32"),
    }.items():
        files = json.loads((tmp_path / name / "jaxq.json").read_text())["files"]
        changed = manifest | {"files": files}
        (tmp_path / name / "jaxq.json").write_text(json.dumps(changed))
        reseal(tmp_path / name)
        check(tmp_path / name, MismatchError, *words)


def test_one_tensor_in_two_files(tmp_path):
    tree = {"a": jnp.ones(3), "b": jnp.ones(3)}
    folder = save(tmp_path / "model", tree, shard_bytes=4)
    one, two = sorted(folder.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    reseal(folder)
    check(folder, CorruptError, two.name, one.name, "both hold 'a'")


# ------------------------------------------------------------------ the manifest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[]", "JSON list where an object belongs"),
        (b'{"format": "jaxq", "format": "jaxq"}', "a key is repeated"),
        (b'{"format": NaN}', "NaN is no JSON number"),
        (b'{"format": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a": ' * 100_000, "nests too deep"),
        (b"{}", "no 'format'"),
        (b'{"format": "other"}', "format 'other', not 'jaxq'"),
        (b'{"format": "jaxq"}', "no 'format_version'"),
        (b'{"format": "jaxq", "format_version": true}', "is True"),
        (b'{"format": "jaxq", "format_version": 0}', "start at 1"),
        (b'{"format": "jaxq", "format_version": 1}', "no 'backend'"),
    ],
)
def test_manifest_text(folder, text, words):
    (folder / "jaxq.json").write_bytes(text)
    check(folder, CorruptError, "jaxq.json", words)


def test_newer_version(folder):
    reseal(folder, lambda m: m.update(format_version=2, written_by="jaxq 9.9"))
    check(folder, VersionError, "version 2", "jaxq 9.9", "to version 1", "--upgrade")


def test_altered_manifest(folder):
    """A static field that changed would decode to other numbers without a word."""
    path = folder / "jaxq.json"
    path.write_text(path.read_text().replace('"pack": 8', '"pack": 16', 1))
    check(folder, CorruptError, "jaxq.json", "was altered", "sha256")


def w(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["parameters"]["params/w"]


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "backend": (lambda m: m.update(backend="zip"), ("backend 'zip'", "safetensors")),
    "kind": (lambda m: w(m).update(kind="torch"), ("params/w", "'torch'", "qtensor")),
    "format": (lambda m: w(m)["spec"].update(format="int99"), ("params/w", "int99")),
    "spec": (lambda m: w(m).update(spec=[]), ("params/w", "'spec' is []")),
    "spec field": (lambda m: w(m)["spec"].update(x=1), ("params/w", "spec", "'x'")),
    "spec block": (lambda m: w(m)["spec"].update(block={}), ("params/w", "spec")),
    "spec type": (lambda m: w(m)["spec"].update(scale=[1]), ("params/w", "spec")),
    "axis": (lambda m: w(m).update(axis=-3), ("params/w", "axis -3", "(24, 32)")),
    "positive axis": (lambda m: w(m).update(axis=0), ("params/w", "axis 0")),
    "pack": (lambda m: w(m).update(pack=0), ("params/w", "pack 0")),
    "odd pack": (lambda m: w(m).update(pack=13), ("params/w", "pack 13")),
    "padding": (lambda m: w(m).update(padding=7), ("params/w", "padding", "(41, 32)")),
    "float": (lambda m: w(m).update(padding=0.5), ("params/w", "0.5", "type int")),
    "block": (lambda m: w(m).update(block=[4, 1]), ("params/w", "scales", "(4, 1)")),
    "rank": (lambda m: w(m).update(block=[8]), ("params/w", "scales", "blocks")),
    "dtype": (lambda m: w(m).update(dtype="object"), ("params/w", "'object'")),
    "shape": (lambda m: w(m).update(shape=[48, 33]), ("params/w", "not (48, 33)")),
    "field": (lambda m: w(m).update(extra=1), ("params/w", "extra")),
    "array": (lambda m: w(m)["arrays"].update(x={}), ("params/w", "'x'")),
    "no codes": (lambda m: w(m)["arrays"].pop("codes"), ("params/w", "no codes")),
    "no scales": (lambda m: w(m)["arrays"].pop("scales"), ("params/w", "no scales")),
    "codes dtype": (
        lambda m: w(m)["arrays"]["codes"].update(dtype="int8"),
        ("params/w", "no uint8 array"),
    ),
    "nested codes": (
        lambda m: w(m)["arrays"].update(zeros=w(m)["arrays"]["scales"]),
        ("params/w", "zeros is no array"),
    ),
    "no arrays": (lambda m: w(m).pop("arrays"), ("params/w", "no 'arrays'")),
    "parameter": (lambda m: m["parameters"].update(x=3), ("'x' is 3",)),
    "value": (
        lambda m: m["parameters"].update({"params/b": {"kind": "value"}}),
        ("params/b", "the value None"),
    ),
    "tree": (lambda m: m.update(tree={"set": []}), ("tree has {'set': []}",)),
    "tree type": (lambda m: m.update(tree=3), ("tree has 3",)),
    "tree entries": (lambda m: m.update(tree={"dict": [1]}), ("entries of a dict",)),
    "tree key": (lambda m: m.update(tree={"dict": [[None, "x"]]}), ("entries",)),
    "tree twice": (
        lambda m: m.update(tree={"dict": [["a", "params/b"], ["a", "params/w"]]}),
        ("repeats or mixes keys",),
    ),
    "tree mixes": (
        lambda m: m.update(tree={"dict": [["a", "params/b"], [1, "params/w"]]}),
        ("repeats or mixes keys",),
    ),
    "tree lacks": (lambda m: m.update(tree={"list": ["params/b"]}), ("'params/w'",)),
    "tree repeats": (
        lambda m: m.update(tree={"list": ["params/b", "params/b", "params/w"]}),
        ("tree and parameters differ",),
    ),
    "clash": (
        lambda m: (
            m["parameters"].update({"params/w/codes": m["parameters"]["params/b"]}),
            m.update(tree={"list": ["params/b", "params/w", "params/w/codes"]}),
        ),
        ("share the name",),
    ),
    "metadata": (lambda m: m.update(metadata=[]), ("'metadata' is []",)),
    "files": (lambda m: m.update(files=[]), ("'files' is []",)),
    "file": (lambda m: m["files"].update({FILE: 3}), (FILE, "is 3")),
    "file size": (lambda m: m["files"][FILE].update(bytes="9"), (FILE, "'9'")),
    "file sum": (lambda m: m["files"][FILE].update(sha256="no"), (FILE, "'no'")),
    "no file": (lambda m: m.update(files={}), ()),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(folder, case):
    change, words = MANIFESTS[case]
    reseal(folder, change)
    error = MismatchError if case == "no file" else CorruptError
    check(folder, error, *words)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../x",
        "..",
        ".",
        "",
        "a//b",
        "a\\b",
        "C:x",
        "x\0",
        "\ud800",
        "é",
        ".hidden",
        "a/" * 8 + "b",
    ],
)
@pytest.mark.parametrize("where", ["files", "extra_files"])
def test_names_that_leave_the_folder(folder, name, where):
    def change(manifest: dict[str, Any]) -> None:
        if where == "files":
            manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        else:
            manifest["extra_files"] = [name]

    reseal(folder, change)
    check(folder, CorruptError, "no plain name inside the folder", "do not trust")


@pytest.mark.parametrize("depth", [120, 300, 480, 5000])
def test_deep_tree(folder, depth):
    path = folder / "jaxq.json"
    text = path.read_text()
    start, end = text.index('"tree": ') + 8, text.index(',\n "parameters"')
    tree = '{"list": [' * depth + '"params/b"' + "]}" * depth
    path.write_text(text[:start] + tree + text[end:])
    check(folder, CorruptError, "jaxq.json", "deep")
