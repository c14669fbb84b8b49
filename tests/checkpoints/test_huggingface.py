"""Reading and writing float Hugging Face folders, and every way they can be broken."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxq.checkpoints import huggingface
from jaxq.checkpoints.huggingface import CheckpointError, write_folder
from jaxq.huggingface import load_huggingface

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama3", copy)
    (copy / "golden.safetensors").unlink()
    return copy


@pytest.fixture
def sharded(folder):
    """The same model in two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate([names[::2], names[1::2]]):
        shard = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_trees_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        )


def test_a_weight_is_transposed_and_keeps_its_dtype(folder):
    stored = load_file(folder / "model.safetensors")
    layer = load_huggingface(folder).params["params"]["layers_1"]
    got = layer["mlp"]["down_proj"]["kernel"]
    assert got.dtype == jnp.bfloat16
    assert got.shape == (48, 32)
    expected = stored["model.layers.1.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(np.asarray(got), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_a_dtype_can_be_asked_for(folder, dtype):
    leaves = jax.tree.leaves(load_huggingface(folder, dtype).params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


def test_shards_are_the_same_model(sharded):
    assert_trees_equal(
        load_huggingface(sharded).params, load_huggingface(GOLDEN / "llama3").params
    )


@pytest.mark.parametrize("name", ["llama3", "llama_biased", "qwen3"])
def test_write_then_read_is_the_identity(name, tmp_path):
    model = load_huggingface(GOLDEN / name)
    slots = model.family.slots(model.config)
    target = tmp_path / "new" / "model"
    write_folder(
        target, model.hf_config, slots, model.params, extra={"note.txt": "hello"}
    )
    again = load_huggingface(target)
    assert again.config == model.config
    assert_trees_equal(again.params, model.params)
    assert (target / "note.txt").read_text() == "hello"
    assert sorted(p.name for p in target.iterdir()) == [
        "config.json",
        "model.safetensors",
        "note.txt",
    ]


def test_a_large_model_is_written_in_shards(folder, tmp_path):
    model = load_huggingface(folder)
    slots = model.family.slots(model.config)
    write = lambda limit: write_folder(
        folder, model.hf_config, slots, model.params, shard_bytes=limit
    )
    write(10_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (folder / "model.safetensors").exists()
    # A header of names and offsets comes on top of the tensors.
    assert all(path.stat().st_size < 10_000 + 2_000 for path in shards)
    assert_trees_equal(load_huggingface(folder).params, model.params)
    write(10**9)
    assert not (folder / "model.safetensors.index.json").exists()
    assert_trees_equal(load_huggingface(folder).params, model.params)


def test_a_full_disk_leaves_the_old_file_and_no_other(folder, monkeypatch):
    model = load_huggingface(folder)
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    slots = model.family.slots(model.config)
    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, model.hf_config, slots, model.params)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*"))


def test_writing_a_tree_of_another_shape_is_refused(folder, tmp_path):
    model = load_huggingface(folder)
    slots = model.family.slots(model.config)
    model.params["params"]["norm"]["weight"] = jnp.ones(7)
    with pytest.raises(CheckpointError, match=r"params/norm/weight.*\(7,\).*\(32,\)"):
        write_folder(tmp_path / "x", model.hf_config, slots, model.params)
    del model.params["params"]["norm"]
    with pytest.raises(CheckpointError, match="has no params/norm/weight"):
        write_folder(tmp_path / "x", model.hf_config, slots, model.params)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_huggingface(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_huggingface(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_huggingface(sharded)


def test_an_index_that_lies_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    swapped = dict.fromkeys(index["weight_map"], "model-00001-of-00002.safetensors")
    path.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(CheckpointError, match="does not hold"):
        load_huggingface(sharded)
    path.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load_huggingface(sharded)
    path.write_text(json.dumps({"weight_map": {"x": ["model.safetensors"]}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load_huggingface(sharded)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="no 'weight_map'"):
        load_huggingface(sharded)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_named_with_its_size(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"safetensors \({len(data)} bytes\)"):
        load_huggingface(folder)


def test_a_corrupt_header_is_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"header of .* is no valid JSON"):
        load_huggingface(folder)


def test_a_missing_and_an_unexpected_tensor_are_named(folder):
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor.*model\.norm\.weight"):
        load_huggingface(folder)

    def rename(tensors):
        tensors["model.norm.weight"] = np.ones(32, np.float32)
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)

    edit_tensors(folder, rename)
    with pytest.raises(CheckpointError, match=r"holds 1 tensor.*q_norm"):
        load_huggingface(folder)


def test_tensors_old_checkpoints_carry_along_are_ignored():
    model = load_huggingface(GOLDEN / "llama_biased")
    assert model.config.tied
    slots = model.family.slots(model.config)
    assert "lm_head.weight" not in slots


def test_an_ignored_tensor(folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_tensors(folder, lambda t: t.update(buffer))
    load_huggingface(folder)


def test_a_config_of_another_size_names_both_shapes(folder):
    edit_config(folder, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"\(32, 48\).*\(32, 64\)"):
        load_huggingface(folder)


def test_pickles_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model\.bin.*can run any code"
    ):
        load_huggingface(folder)


def test_shards_without_their_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="fetch the index"):
        load_huggingface(sharded)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="fetch the weights"):
        load_huggingface(folder)


def test_integer_weights_are_no_float_checkpoint(folder):
    def pack(tensors):
        tensors["lm_head.weight"] = np.zeros((64, 32), np.int8)

    edit_tensors(folder, pack)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is I8.*quantized"):
        load_huggingface(folder)


def test_a_config_of_a_quantized_model_beside_floats_is_refused(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="in the format gptq, but none of its"):
        load_huggingface(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_huggingface(folder)


def test_a_broken_tokenizer_is_named(folder):
    assert load_huggingface(folder).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_huggingface(folder)
