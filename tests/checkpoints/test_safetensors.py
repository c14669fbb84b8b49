"""Our safetensors files against the library's, both ways; the shards of a folder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxq.checkpoints import load, safetensors, save, shards
from jaxq.checkpoints.dtypes import SAFETENSORS_NAMES
from tests.checkpoints.trees import assert_same, variants

NAMES = [name for name, known in SAFETENSORS_NAMES.items() if known]
# the library's reader for NumPy has no word for these two
READABLE = [name for name in NAMES if not name.startswith("float8")]


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    out = {"empty": np.zeros((0, 3), np.float32), "scalar": np.float32(2)}
    for i, name in enumerate(READABLE):
        data = rng.integers(0, 2, (i + 1, 3))
        out[name] = np.asarray(data, jnp.dtype(name))
    return {name: np.asarray(array) for name, array in out.items()}


def test_the_library_reads_what_we_write(tmp_path, rng):
    tree = arrays(rng)
    save(tmp_path / "model", tree)
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert set(found) == set(tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_the_library_knows_our_dtypes(tmp_path):
    tree = {name: jnp.zeros((2, 2)).astype(name) for name in NAMES if "64" not in name}
    save(tmp_path / "model", tree)
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        for name in tree:
            assert file.get_slice(name).get_dtype() == SAFETENSORS_NAMES[name]
            assert file.get_slice(name).get_shape() == [2, 2]


def test_we_read_what_the_library_writes(tmp_path, rng):
    tree = arrays(rng)
    save_file(tree, tmp_path / "x.safetensors", metadata={"format": "pt"})
    reader = safetensors.Reader(tmp_path / "x.safetensors")
    assert set(reader.entries) == set(tree)
    for name, array in tree.items():
        assert reader.entries[name].shape == array.shape
        assert reader.entries[name].dtype == SAFETENSORS_NAMES[array.dtype.name]
        assert reader[name].tobytes() == array.tobytes()


def test_tensors_are_aligned(tmp_path):
    """A memory map of the file needs no copy to be used by another program."""
    tree = {
        "a": np.ones(3, np.uint8),
        "b": np.ones(3, np.float64),
        "c": np.ones(3, np.float16),
    }
    folder = save(tmp_path / "model", tree)
    reader = safetensors.Reader(folder / "model.safetensors")
    begin = reader.size - sum(e.end - e.start for e in reader.entries.values())
    for name, array in tree.items():
        assert (begin + reader.entries[name].start) % array.itemsize == 0


def test_views_cannot_be_written_through(tmp_path):
    folder = save(tmp_path / "model", {"a": jnp.ones(3)})
    reader = safetensors.Reader(folder / "model.safetensors")
    assert not reader["a"].flags.writeable


# ------------------------------------------------------------------ shards


@pytest.mark.parametrize("limit", [1, 400, 1000, 4000, 10**9])
def test_shards(tmp_path, limit):
    tree = {"q": variants("int4"), "b": [jnp.arange(i) for i in range(12)]}
    folder = save(tmp_path / "model", tree, shard_bytes=limit)
    assert_same(load(folder), tree)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
        assert not (folder / shards.INDEX).exists()
        return
    n = len(files)
    assert files == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    index = json.loads((folder / shards.INDEX).read_text())["weight_map"]
    for file in files:
        entries = safetensors.Reader(folder / file).entries
        sizes = [e.end - e.start for e in entries.values()]
        assert sum(sizes) <= limit or sum(s > 0 for s in sizes) == 1
        assert {index[name] for name in entries} == {file}


def test_a_shard_is_filled_before_the_next(tmp_path):
    tree = {f"{i:02}": jnp.ones(100, jnp.uint8) for i in range(10)}
    folder = save(tmp_path / "model", tree, shard_bytes=300)
    held = [
        list(safetensors.Reader(path).entries)
        for path in sorted(folder.glob("*.safetensors"))
    ]
    assert [len(names) for names in held] == [3, 3, 3, 1]
    assert [name for names in held for name in names] == sorted(tree)


def test_fetching_leaves_no_copy_behind(tmp_path):
    """JAX would keep the host copy of a sharded array as long as the array lives."""
    mesh = jax.make_mesh((8,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"x": jax.device_put(jnp.ones(8 << 17), place)}
    import tracemalloc

    tracemalloc.start()
    save(tmp_path / "model", tree)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak > 4 << 20, "it was put together once"
    assert left < 1 << 20


def test_the_file_is_what_its_manifest_says(tmp_path: Path):
    folder = save(tmp_path / "model", {"x": jnp.ones(3)})
    import hashlib

    told = json.loads((folder / "jaxq.json").read_text())["files"]["model.safetensors"]
    data = (folder / "model.safetensors").read_bytes()
    assert told == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
