"""Hundreds of mutated files: a `CheckpointError` or a tree, never anything else."""

import copy
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.checkpoints import CheckpointError, inspect, load, save
from jaxq.qtensor import is_qtensor
from tests.checkpoints.trees import contents, reseal, variants

ODD = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        64,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**50,
    ),
    *(0.5, 1e308, "", "x", "int4", "float32", "object", "F32", "U8", "../x", "\ud800"),
    *([], [0], [1, 2], [-1], [2**62] * 9, [[]], {}, {"a": 1}, {"dict": []}, "codes"),
]
FILE = "model.safetensors"


class Files(dict[str, bytes]):
    """A dict that a failing test does not print in full."""

    def __repr__(self) -> str:
        return f"Files({', '.join(self)})"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        "q": variants("uint3")["double"],
        "a": variants("int4")["asymmetric"],
        "b": [jnp.ones(4, "bfloat16"), (3, None)],
    }
    return save(tmp_path_factory.mktemp("whole") / "model", tree, metadata={"x": [1]})


@pytest.fixture(scope="module")
def files(whole: Path) -> dict[str, bytes]:
    return Files(contents(whole))


@pytest.fixture
def restored(whole: Path, files: dict[str, bytes]) -> Iterator[Path]:
    yield whole
    for name, data in files.items():
        (whole / name).write_bytes(data)


def load_or_refuse(folder: Path) -> Any:
    """The tree, None where it was refused; any other exception fails the test."""
    try:
        inspect(folder)
        tree = load(folder)
    except CheckpointError as error:
        message = str(error)
        assert 10 < len(message) < 1000
        assert message.isprintable()
        return None
    for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor):
        assert repr(leaf)
    return tree


def mutate(draw: st.DrawFn, data: Any) -> Any:
    """Replace, remove, double or rename something anywhere in JSON data."""
    data = copy.deepcopy(data)
    places = list(_places(data))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(places))
        where = range(len(parent)) if isinstance(parent, list) else parent
        if key not in where:
            continue
        action = draw(st.sampled_from(["replace", "remove", "copy", "nudge"]))
        if action == "remove":
            del parent[key]
        elif action == "copy":
            other, from_ = draw(st.sampled_from(places))
            there = range(len(other)) if isinstance(other, list) else other
            if from_ in there:
                parent[key] = copy.deepcopy(other[from_])
        elif action == "nudge" and type(parent[key]) is int:
            parent[key] += draw(st.sampled_from([-8, -1, 1, 8]))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


@given(data=st.data())
@settings(max_examples=300)
def test_mutated_headers(whole, files, data):
    """The length fits and the checksums are right: only the header is odd."""
    blob = files[FILE]
    (length,) = struct.unpack("<Q", blob[:8])
    parsed = json.loads(blob[8 : 8 + length])
    mutated = mutate(data.draw, parsed)
    text = json.dumps(mutated).encode()
    (whole / FILE).write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + length :])
    (whole / "jaxq.json").write_bytes(files["jaxq.json"])
    reseal(whole)
    found = load_or_refuse(whole)
    parsed.pop("__metadata__")
    said = mutated.pop("__metadata__", {})
    texts = isinstance(said, dict) and all(isinstance(t, str) for t in said.values())
    unchanged = texts and json.dumps(mutated, sort_keys=True) == json.dumps(
        parsed, sort_keys=True
    )
    assert (found is not None) == unchanged, "each field of a header counts"


@given(data=st.data())
@settings(max_examples=300)
def test_mutated_header_bytes(whole, files, data):
    """Bytes changed, inserted or cut anywhere in the first part of the file."""
    blob = bytearray(files[FILE])
    (length,) = struct.unpack("<Q", blob[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, length + 16))
        stop = start + data.draw(st.sampled_from([0, 1, 1, 4]))
        blob[start:stop] = data.draw(st.binary(max_size=4))
    (whole / FILE).write_bytes(blob)
    (whole / "jaxq.json").write_bytes(files["jaxq.json"])
    if data.draw(st.booleans()):
        reseal(whole)
    load_or_refuse(whole)


@given(data=st.data())
@settings(max_examples=400)
def test_mutated_manifests(whole, files, data):
    """Anything in the manifest is odd, and its checksum right."""
    (whole / FILE).write_bytes(files[FILE])
    content = mutate(data.draw, json.loads(files["jaxq.json"]))
    content.pop("sha256", None)
    (whole / "jaxq.json").write_text(json.dumps(content | {"sha256": ""}))
    try:
        _seal(whole)
    except UnicodeEncodeError:
        return
    tree = load_or_refuse(whole)
    for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            assert np.isfinite(leaf.bits_per_weight)


def _seal(folder: Path) -> None:
    content = json.loads((folder / "jaxq.json").read_text())
    files = content.pop("files", {})
    (folder / "jaxq.json").write_text(json.dumps(content | {"files": {}}))
    reseal(folder, lambda m: m.update(files=files))


@given(data=st.data())
@settings(max_examples=300)
def test_mutated_manifest_bytes(whole, files, data):
    (whole / FILE).write_bytes(files[FILE])
    blob = bytearray(files["jaxq.json"])
    start = data.draw(st.integers(0, len(blob)))
    stop = start + data.draw(st.sampled_from([0, 1, 2, 10**6]))
    blob[start:stop] = data.draw(st.binary(max_size=4))
    (whole / "jaxq.json").write_bytes(blob)
    load_or_refuse(whole)


def test_the_fuzzers_start_from_something_good(restored, files):
    for name, data in files.items():
        (restored / name).write_bytes(data)
    assert load_or_refuse(restored) is not None
