"""Tensors that stay in their files: the same numbers, one at a time, none kept."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxq.checkpoints import CorruptError, MissingFileError, lazy
from jaxq.checkpoints.huggingface import lazy_tensors, read_tensors
from jaxq.checkpoints.lazy import LazyArray
from jaxq.checkpoints.safetensors import read_header
from jaxq.huggingface import load_huggingface
from jaxq.models.families import Slot, find_family
from tests.checkpoints.trees import assert_same

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


def write(path, **arrays):
    save_file(arrays, path)
    return read_header(path)


@pytest.mark.parametrize("piece", [1, 100, lazy.PIECE])
@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_read_is_what_the_library_reads(
    tmp_path, rng, monkeypatch, stored, piece
):
    """Converted and turned, whatever the number of pieces it is read in."""
    monkeypatch.setattr(lazy, "PIECE", piece)
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3), (4, 0), (17, 1)]
    arrays = {str(s): rng.normal(size=s).astype(jnp.dtype(stored)) for s in shapes}
    header = write(tmp_path / "x.safetensors", **arrays)
    library = load_file(tmp_path / "x.safetensors")
    for name, array in library.items():
        for dtype in (None, "float32", "float16", "bfloat16"):
            for transposed in (False, True):
                leaf = LazyArray.of(header, name, dtype, transposed)
                wanted = array.T if transposed else array
                wanted = wanted.astype(jnp.dtype(dtype or stored))
                found = leaf.read()
                assert found.flags.c_contiguous
                assert (leaf.shape, leaf.dtype) == (found.shape, found.dtype)
                assert (leaf.ndim, leaf.size) == (found.ndim, found.size)
                assert leaf.nbytes == found.nbytes
                assert_same(found, np.asarray(wanted))


def test_it_stands_for_an_array(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    leaf = LazyArray.of(write(tmp_path / "x.safetensors", w=array), "w", None, True)
    assert jax.tree.leaves({"a": leaf}) == [leaf]
    np.testing.assert_array_equal(np.asarray(leaf), array.T)
    np.testing.assert_array_equal(np.asarray(leaf, np.float64), array.T)
    np.testing.assert_array_equal(jnp.asarray(leaf), array.T)
    assert jax.eval_shape(lambda x: x @ x.T, leaf).shape == (3, 3)
    assert leaf.abstract == jax.ShapeDtypeStruct((3, 2), jnp.float32)
    assert repr(leaf) == "LazyArray(float32[3, 2], 'w' of x.safetensors)"
    with pytest.raises(ValueError, match="cannot be had uncopied"):
        np.asarray(leaf, copy=False)


@pytest.mark.parametrize("name", ["llama3", "llama_biased", "qwen3"])
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_a_lazy_model_is_the_model(name, dtype):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    family = find_family(config)
    slots = family.slots(family.read_config(config))
    leaves = lazy_tensors(GOLDEN / name, slots, dtype, ("rotary_emb.inv_freq",))
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(leaves))
    read = jax.tree.map(LazyArray.read, leaves)
    assert_same(read, load_huggingface(GOLDEN / name, dtype).params)


def test_only_headers_are_read_and_all_is_checked(tmp_path):
    """A file whose numbers would be 64 GB opens; one byte less does not."""
    path = sparse(tmp_path, tensors=2, shape=(2**17, 2**17))
    slots = {name: Slot((name,), (2**17, 2**17), True) for name in ("t0", "t1")}
    tree = lazy_tensors(tmp_path, slots)
    assert tree["t1"].nbytes == 2**35
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CorruptError, match="truncated"):
        lazy_tensors(tmp_path, slots)


def sparse(folder: Path, tensors: int, shape: tuple[int, ...]) -> Path:
    """A checkpoint of zeros that takes no room on the disk."""
    size = int(np.prod(shape)) * 2
    header = {
        f"t{i}": {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + tensors * size)
    return path


@pytest.mark.parametrize("change", ["grown", "truncated", "gone"])
def test_a_file_that_changes_between_reads(tmp_path, change):
    path = tmp_path / "x.safetensors"
    leaf = LazyArray.of(write(path, w=np.ones(9, np.float32)), "w")
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
        with pytest.raises(MissingFileError, match=r"x\.safetensors can no longer"):
            leaf.read()
        return
    path.write_bytes(data + b"more" if change == "grown" else data[:-3])
    with pytest.raises(CorruptError, match=rf"had {len(data)} bytes, and has"):
        leaf.read()


def test_a_tensor_is_never_there_twice(tmp_path, monkeypatch):
    """Neither its conversion nor its transpose costs a second one."""
    monkeypatch.setattr(lazy, "PIECE", 10_000)
    header = write(tmp_path / "x.safetensors", w=np.ones((1000, 500), np.float16))
    for dtype in ("float16", "float32"):
        for transposed in (False, True):
            leaf = LazyArray.of(header, "w", dtype, transposed)
            tracemalloc.start()
            array = leaf.read()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < array.nbytes + 50_000


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_a_model_larger_than_memory(tmp_path):
    """Resident memory while 0.5 GB goes by, 32 MB at a time, mapped pages included."""
    sparse(tmp_path, tensors=16, shape=(4096, 4096))
    # not ru_maxrss: it begins with the peak of the process that started this one
    code = f"""
from pathlib import Path
from jaxq.checkpoints.huggingface import lazy_tensors
from jaxq.models.families import Slot
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
slots = {{f"t{{i}}": Slot((f"t{{i}}",), (4096, 4096), i % 2 == 0) for i in range(16)}}
tree = lazy_tensors({str(tmp_path)!r}, slots)
tree["t0"].read(), tree["t1"].read()
before = peak()
for leaf in tree.values():
    assert leaf.read().shape == (4096, 4096)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 < 2**25, "less than one more tensor"


def test_reading_a_tree_is_built_on_it(tmp_path):
    """Also for a family whose model has never been seen: the slots say it all."""
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    save_file(arrays, tmp_path / "model.safetensors")
    slots = {"a": Slot(("x", "k"), (2, 3), True), "b": Slot(("x", "b"), (4,), False)}
    wanted = {"x": {"k": arrays["a"].T, "b": arrays["b"]}}
    assert_same(read_tensors(tmp_path, slots), wanted)
    assert list(read_tensors(tmp_path, slots)["x"]) == ["k", "b"]
