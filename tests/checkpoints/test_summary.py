"""`inspect` tells what is in a folder, from its manifest and headers alone."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxq.checkpoints import CheckpointError, inspect, load, placement, save
from jaxq.checkpoints.backends import BACKENDS
from jaxq.checkpoints.errors import MissingFileError, UnsupportedError
from jaxq.presets import PRESETS
from jaxq.spec import QuantSpec
from tests.checkpoints.trees import assert_same, variants, with_everything

backends = pytest.mark.parametrize("backend", BACKENDS)


def tree():
    q = variants("int4")["group"]
    return {
        "params": {
            "w": q,
            "b": jnp.ones(32, "bfloat16"),
            "n": 7,
            "e": with_everything(),
        }
    }


@backends
def test_inspect(tmp_path, backend, monkeypatch):
    params = tree()["params"]
    recipe = next(iter(PRESETS.values()))
    save(
        tmp_path / "model",
        tree(),
        backend=backend,
        config={"model_type": "llama"},
        recipe=recipe,
        metadata={"evidence": [{"tokens": 5}]},
        extra_files={"tokenizer.json": "{}"},
    )
    monkeypatch.setattr(placement, "put", None)  # no number is read
    found = inspect(tmp_path / "model")
    rows = {row.path: row for row in found.rows}
    assert set(rows) == {"params/w", "params/b", "params/n", "params/e"}
    q = params["w"]
    assert rows["params/w"].kind == "qtensor"
    assert rows["params/w"].spec == "int4 g16, e4m3 scales"
    assert rows["params/w"].shape == (48, 32)
    # 4 bits per code, and 8 bits of scale for 16 of them
    assert rows["params/w"].bytes == 48 * 32 // 2 + 3 * 32 == q.nbytes
    assert rows["params/w"].bits_per_weight == 4.5 == q.bits_per_weight
    assert rows["params/b"].bytes == 64
    assert rows["params/b"].bits_per_weight == 16
    assert rows["params/n"].spec == "int 7"
    assert "int8 token" in rows["params/e"].spec
    leaves = [a for a in jax.tree.leaves(tree()) if isinstance(a, jax.Array)]
    stored = sum(a.size * a.dtype.itemsize for a in leaves)
    assert found.bytes == stored
    assert found.parameters == 48 * 32 + 32 + 1 + 2 * 30 * 8
    assert found.backend == backend
    assert found.config == {"model_type": "llama"}
    assert found.extra_files == ("config.json", "tokenizer.json")
    assert found.recipe == recipe.to_dict()
    assert found.metadata == {"evidence": [{"tokens": 5}]}
    assert json.loads(json.dumps(found.to_dict()))["bytes"] == stored
    text = str(found)
    assert text.count("\n") == 4
    assert "int4 g16, e4m3 scales" in text
    assert "4.500 bits" in text


def test_bits_of_the_quantized_part(tmp_path):
    params = {"w": variants("int4")["group"], "b": jnp.ones(10_000)}
    found = inspect(save(tmp_path / "model", params))
    assert found.quantized_bits_per_weight == 4.5
    assert found.bits_per_weight > 20


def test_files_of_a_model(tmp_path):
    """What the model's loader reads lies in the folder as it was given."""
    source = tmp_path / "vocab.txt"
    source.write_text("a b c")

    class Config:
        def to_dict(self):
            return {"hidden_size": 8}

    folder = save(
        tmp_path / "model",
        tree(),
        config=Config(),
        extra_files={"tokenizer.json": "{}", "bytes.bin": b"\0\1", "vocab.txt": source},
    )
    assert json.loads((folder / "config.json").read_text()) == {"hidden_size": 8}
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "bytes.bin").read_bytes() == b"\0\1"
    assert (folder / "vocab.txt").read_text() == "a b c"
    assert_same(load(folder), tree())
    # they may be edited: the numbers do not depend on them
    (folder / "config.json").write_text('{"hidden_size": 9}')
    assert inspect(folder).config == {"hidden_size": 9}
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no valid JSON"):
        inspect(folder)
    assert_same(load(folder), tree())
    save(folder, tree(), overwrite=True)
    assert not (folder / "vocab.txt").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "",
        ".",
        "jaxq.json",
        "x.safetensors",
        "config.json",
        "/etc/passwd",
    ],
)
def test_bad_names_of_extra_files(tmp_path, name):
    with pytest.raises(UnsupportedError, match="plain file name"):
        save(tmp_path / "model", {}, config={}, extra_files={name: "x"})
    assert not list(tmp_path.iterdir())


def test_extra_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere\.json"):
        save(
            tmp_path / "model",
            {},
            extra_files={"tokenizer.json": tmp_path / "nowhere.json"},
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"x": jnp.ones(1)}},
        {"metadata": {"x": float("nan")}},
        {"recipe": object()},
        {"config": {"x": {1, 2}}},
    ],
)
def test_what_is_no_plain_data(tmp_path, fields):
    with pytest.raises(
        UnsupportedError, match=f"{next(iter(fields))} must be plain data"
    ):
        save(tmp_path / "model", {}, **fields)
    assert not list(tmp_path.iterdir())


def test_a_spec_is_a_recipe_too(tmp_path):
    folder = save(tmp_path / "model", {}, recipe=QuantSpec("nf4", 64))
    assert QuantSpec.from_dict(inspect(folder).recipe) == QuantSpec("nf4", 64)
