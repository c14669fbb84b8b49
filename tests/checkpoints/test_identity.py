"""The identity of a model's files: what it sees, and that it reads little."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxq.checkpoints import CorruptError, MissingFileError, file_identity, identity
from jaxq.checkpoints.safetensors import read_header


@pytest.fixture
def folder(tmp_path, rng):
    arrays = {
        f"t{i}": rng.normal(size=(100, 100 * i)).astype(np.float16) for i in range(4)
    }
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("hello")
    return tmp_path


@pytest.fixture(params=["all", "samples"])
def hashed(request, monkeypatch):
    if request.param == "samples":
        monkeypatch.setattr(identity, "SMALL", 1000)
        monkeypatch.setattr(identity, "PAGE", 64)
    return request.param


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_what_does_not_matter(folder, hashed):
    before = file_identity(folder)
    assert list(before) == ["config.json", "model.safetensors"]
    assert before["model.safetensors"]["hashed"] == hashed
    os.utime(folder / "model.safetensors", (0, 0))
    (folder / "README.md").write_text("good bye")
    assert file_identity(str(folder)) == before


def test_what_does(folder, hashed):
    """The header, the first and last bytes, every tensor."""
    path = folder / "model.safetensors"
    before, size = file_identity(folder), path.stat().st_size
    header = read_header(path)
    middles = [
        header.start + (e.start + e.end) // 2
        for e in header.entries.values()
        if e.end > e.start
    ]
    key = path.read_bytes().index(b"t3")
    for position in (key, header.start, size - 1, *middles):
        flip(path, position)
        after = file_identity(folder)
        assert (
            after["model.safetensors"]["sha256"]
            != before["model.safetensors"]["sha256"]
        )
        flip(path, position)
    assert file_identity(folder) == before
    (folder / "config.json").write_text("{ }")
    assert file_identity(folder) != before


def test_what_is_not_a_model(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="holds no safetensors"):
        file_identity(folder)


def test_a_large_file_that_is_truncated(folder, monkeypatch):
    monkeypatch.setattr(identity, "SMALL", 1000)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="truncated"):
        file_identity(folder)
