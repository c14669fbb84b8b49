"""A checkpoint in steps: killed, cut short or changed, it goes on or says why not."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxq
from jaxq.checkpoints import (
    BusyError,
    CheckpointError,
    CorruptError,
    ExistsError,
    MismatchError,
    MissingFileError,
    UnsupportedError,
    VersionError,
    WriteError,
    atomic,
    inspect,
    journal,
    load,
    lock,
    manifest,
    open_stream,
    safetensors,
    save,
)
from jaxq.checkpoints.huggingface import lazy_tensors, read_config
from jaxq.checkpoints.lazy import LazyArray
from jaxq.models.families import Slot, find_family
from jaxq.qtensor import QTensor
from tests.checkpoints import interrupted
from tests.checkpoints.trees import assert_same, contents, variants, with_everything

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
PRINT = {"recipe": {"bits": 4, "rules": ["a", "b"]}, "jaxq": "1"}


def block(step: int) -> dict[str, np.ndarray]:
    return {
        name: np.arange(n, dtype=np.float32) + step for name, n in (("a", 5), ("b", 9))
    }


def steps(writer, *numbers):
    for i in numbers:
        for name, array in block(i).items():
            writer.put(f"layer{i}/{name}", array)
        writer.commit(f"step {i}", {"x": np.full(4, i)}, {"loss": i / 2})


def tree(count):
    return {f"layer{i}": block(i) for i in range(count)}


def begun(target, count, **options):
    """What an interrupted run leaves after so many steps."""
    with open_stream(target, fingerprint=PRINT, **options) as writer:
        steps(writer, *range(count))
    return target.with_name(f"{target.name}.partial")


def again(target, **options):
    return open_stream(target, **({"fingerprint": PRINT, "resume": True} | options))


# ------------------------------------------------------------------ the checkpoint


def everything():
    return {
        "params": {
            "q": {**variants("int4"), "all": with_everything()},
            "list": [jnp.arange(3), (np.float64(2), True)],
            "n": 3,
            "f8": np.asarray(jnp.ones(3).astype("float8_e4m3b11fnuz")),
            "none": None,
        }
    }


@pytest.mark.parametrize("limit", [200, 10**9])
def test_it_is_what_save_writes(tmp_path, limit):
    """Also by the paths, order and structure of its manifest; only files differ."""
    params, about = everything(), {"recipe": {"r": 1}, "metadata": {"m": [None, 2.5]}}
    extra = {"config": {"model_type": "x"}, "extra_files": {"t.json": "{}"}}
    whole = save(tmp_path / "whole", params, **about, **extra)
    with open_stream(tmp_path / "s", fingerprint=0, shard_bytes=limit) as writer:
        leaves = list(jaxq.checkpoints.structure.flatten(params).items())
        for i, (path, leaf) in enumerate(reversed(leaves)):
            writer.put(path, leaf)
            if i % 4 == 0:
                writer.commit(path)
        writer.commit("last")
        streamed = writer.finish(params, **about, **extra)
    assert streamed == tmp_path / "s"
    assert sorted(os.listdir(tmp_path)) == ["s", "whole"]
    assert_same(load(streamed), load(whole))
    assert str(inspect(streamed)).split(" (")[0] == str(inspect(whole)).split(" (")[0]
    one, other = (
        json.loads((folder / "jaxq.json").read_text()) for folder in (streamed, whole)
    )
    assert set(one.pop("files")) != set(other.pop("files"))
    assert one.pop("sha256") != other.pop("sha256")
    assert json.dumps(one) == json.dumps(other)
    sizes = [file.stat().st_size for file in streamed.glob("*.safetensors")]
    assert (len(sizes) > 20) == (limit == 200)


def test_a_model_goes_through_step_by_step(tmp_path):
    """Read lazily, one weight quantized, the rest copied; `load_model` reads it."""
    config = read_config(GOLDEN / "llama3")
    family = find_family(config)
    lazy = lazy_tensors(GOLDEN / "llama3", family.slots(family.read_config(config)))
    leaves = jaxq.checkpoints.structure.flatten(lazy)
    chosen = "params/layers_1/mlp/down_proj/kernel"
    with open_stream(tmp_path / "m", fingerprint=0) as writer:
        for path, leaf in leaves.items():
            assert isinstance(leaf, LazyArray)
            if path == chosen:
                leaf = jaxq.quantize(jnp.asarray(leaf), jaxq.QuantSpec("int4", 16))
            writer.put(path, leaf)
        writer.commit("all")
        writer.finish(lazy, config=config)
    original = jaxq.load_model(GOLDEN / "llama3").params
    found = jaxq.load_model(tmp_path / "m").params
    q = found["params"]["layers_1"]["mlp"]["down_proj"].pop("kernel")
    w = original["params"]["layers_1"]["mlp"]["down_proj"].pop("kernel")
    assert isinstance(q, QTensor)
    assert_same(q, jaxq.quantize(w, jaxq.QuantSpec("int4", 16)))
    assert_same(found, original)


def test_a_step_is_split_at_the_limit_and_never_joined(tmp_path):
    names = [f"{step}{i}" for step, count in enumerate((7, 1, 2)) for i in range(count)]
    params = {name: np.ones(100, np.uint8) for name in names}
    with open_stream(tmp_path / "m", fingerprint=0, shard_bytes=300) as writer:
        for step in "012":
            for name in names:
                if name.startswith(step):
                    writer.put(name, params[name])
            writer.commit(step)
        folder = writer.finish(params)
    files = sorted(folder.glob("*.safetensors"))
    assert [p.name for p in files] == [f"model-{i:05}.safetensors" for i in range(1, 6)]
    held = [list(safetensors.read_header(p).entries) for p in files]
    assert held == [
        ["00", "01", "02"],
        ["03", "04", "05"],
        ["06"],
        ["10"],
        ["20", "21"],
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: path.name
        for path, names in zip(files, held, strict=True)
        for name in names
    }
    assert index["metadata"]["total_size"] == sum(p.stat().st_size for p in files)


# ------------------------------------------------------------------ memory


def test_nothing_is_held_after_a_commit(tmp_path):
    with open_stream(tmp_path / "m", fingerprint=0) as writer:
        array, state = np.ones(10), np.ones(10)
        writer.put("a", array)
        writer.commit("a", {"x": state})
        held = weakref.ref(array), weakref.ref(state)
        del array, state
        assert [ref() for ref in held] == [None, None]


def test_a_file_that_is_full_is_written_before_the_commit(tmp_path):
    """So a step larger than memory is no trouble, and the state is not copied."""
    size = 1 << 20
    tracemalloc.start()
    with open_stream(tmp_path / "m", fingerprint=0, shard_bytes=2 * size) as writer:
        for i in range(10):
            writer.put(f"{i}", np.ones(size, np.uint8))
        state = {"x": np.ones(4 * size, np.uint8)}
        writer.commit("a", state)
        del state
        writer.state()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (2 + 4 + 0.5) * size


def test_only_the_newest_state_is_kept(tmp_path):
    target = tmp_path / "m"
    place = begun(target, 3)
    assert [p.name for p in place.glob("state-*")] == ["state-00003.safetensors"]
    with again(target) as writer:
        assert_same(writer.state(), {"x": np.full(4, 2)})
        writer.commit("without")
        assert_same(writer.state(), {"x": np.full(4, 2)})
        writer.commit("no more", {})
        assert writer.state() == {}
        assert not list(place.glob("state-*"))
        state = {"k": jnp.ones((2, 3), jnp.bfloat16), "b": np.array([True, False])}
        state["e8"] = np.asarray(jnp.ones(3).astype("float8_e8m0fnu"))
        state["scalar"], state["empty"] = np.float32(3), np.zeros((0, 2))
        writer.commit("with", state)
    with again(target) as writer:
        assert_same(writer.state(), jax.tree.map(np.asarray, state))


# ------------------------------------------------------------------ interruptions


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="itself"),
        pytest.param(["convert"], id="converted", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, words):
    """Before every operation on files, after few, and at random times."""
    sample = {"a": variants("int4")["group"], "b": variants("int4")["double"]}
    sample |= {"c": np.ones(5, np.float32), "d": np.zeros((100, 20), np.uint8)}
    save(tmp_path / "sample", sample)
    run = subprocess.run(
        [sys.executable, interrupted.__file__, str(tmp_path), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["events"] > 60
    assert told["deaths"] > 5
    folder = tmp_path / "uninterrupted" / "model"
    assert set(told["files"]) == set(contents(folder))
    if words:
        assert set(told["files"]) == {"model.bin", "config.json"}
    else:
        assert list(load(folder)["layers"]["1"]) == ["a", "b", "c", "d"]


def test_a_step_is_on_the_disk_before_the_journal_lists_it(tmp_path, monkeypatch):
    """What a power failure would leave: contents and names, in that order."""
    synced, sync, replace = {}, os.fsync, os.replace

    def remember(handle):
        sync(handle)
        status = os.fstat(handle)
        synced[status.st_ino] = status.st_mtime_ns

    def check(source, target):
        place = Path(source).parent
        content = json.loads(Path(source).read_text())
        listed = [
            place / "model" / f for step in content["steps"] for f in step["files"]
        ]
        listed += [place / content["state"]["file"]] if content["state"] else []
        for path in [*listed, Path(source), *({place / "model"} if listed else ())]:
            assert synced[path.stat().st_ino] == path.stat().st_mtime_ns, path
        replace(source, target)
        synced.pop(place.stat().st_ino, None)
        moved.append(place)

    moved = []
    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "replace", check)
    with open_stream(tmp_path / "m", fingerprint=0) as writer:
        steps(writer, 0, 1)
        assert moved[-1].stat().st_ino in synced, "the journal's name, too"
        writer.finish(tree(2))
    assert len(moved) == 4, "begun, two steps, published"
    assert tmp_path.stat().st_ino in synced


def interrupt(writer, count):
    """Ctrl-C in the middle of a step."""
    with writer:
        steps(writer, *range(count))
        writer.put("next", np.ones(3))
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    writer = open_stream(tmp_path / "m", fingerprint=PRINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupt(writer, 2)
    (note,) = caught.value.__notes__
    assert note.startswith(f"2 finished steps are kept in {tmp_path / 'm.partial'}")
    assert "--resume" in note
    with pytest.raises(ValueError, match="is closed"):
        writer.put("layer2/a", np.ones(3))
    with again(tmp_path / "m") as writer:
        assert writer.steps == ["step 0", "step 1"]
        assert writer.evidence() == {"step 0": {"loss": 0.0}, "step 1": {"loss": 0.5}}
        steps(writer, 2)
        writer.finish(tree(3))
    assert_same(load(tmp_path / "m"), jax.tree.map(jnp.asarray, tree(3)))


def test_ctrl_c_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupt(open_stream(tmp_path / "m", fingerprint=PRINT), 0)
    assert caught.value.__notes__ == [
        "No step was finished, so nothing is kept: run it again"
    ]
    assert not list(tmp_path.iterdir())


def test_full_disk(tmp_path):
    """The system refuses to write on: the step is undone, the others stay."""
    target, soft = tmp_path / "m", resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_stream(target, fingerprint=PRINT, shard_bytes=700_000) as writer:
        steps(writer, 0)
        before = contents(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, soft[1]))
        try:
            writer.put("big/a", np.ones(100_000, np.uint8))
            writer.put("big/b", np.ones(650_000, np.uint8))
            with pytest.raises(WriteError, match="parameter 'big/c'"):
                writer.put("big/c", np.ones(650_000, np.uint8))
            assert contents(tmp_path) == before
            writer.put("big/a", np.ones(1000, np.uint8))
            with pytest.raises(WriteError) as caught:
                writer.commit("big", {"x": np.ones(10**6, np.uint8)})
            assert contents(tmp_path) == before
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        message = str(caught.value)
        assert "could not write step 'big' of" in message
        assert "It needs about 1,001,000 bytes, and " in message
        assert "make room. 1 finished steps are kept in" in message
        assert "--resume" in message
        assert writer.steps == ["step 0"]
    with again(target) as writer:
        steps(writer, 1)
        writer.finish(tree(2))
    assert_same(load(target), jax.tree.map(jnp.asarray, tree(2)))


def test_too_small_a_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 500, 500)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WriteError, match="about 501 bytes, and 500 are free"):
        open_stream(tmp_path / "m", fingerprint=PRINT, needed=501)
    assert not list(tmp_path.iterdir())
    with open_stream(tmp_path / "m", fingerprint=PRINT, needed=400) as writer:
        steps(writer, 0)
        before = contents(tmp_path)
        with pytest.raises(WriteError, match=r"step 'x'.* about 501 bytes") as caught:
            writer.commit("x", {"x": np.ones(501, np.uint8)})
        assert caught.value.errno == errno.ENOSPC
        assert contents(tmp_path) == before
    done = sum(p.stat().st_size for p in tmp_path.rglob("model-*"))
    with pytest.raises(WriteError, match=f"about {done + 501:,} bytes"):
        again(tmp_path / "m", needed=done + 501)
    again(tmp_path / "m", needed=done + 500).close()


def test_a_source_that_vanishes_undoes_the_step(tmp_path):
    save_file({"w": np.ones(9, np.float32)}, tmp_path / "model.safetensors")
    lazy = lazy_tensors(tmp_path, {"w": Slot(("w",), (9,), False)})
    with open_stream(tmp_path / "m", fingerprint=PRINT) as writer:
        steps(writer, 0)
        before = contents(tmp_path / "m.partial")
        writer.put("w", lazy["w"])
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(MissingFileError, match="can no longer be read"):
            writer.commit("w")
        assert contents(tmp_path / "m.partial") == before


# ------------------------------------------------------------------ going on


def test_what_was_begun_differently_is_not_resumed(tmp_path):
    place = begun(tmp_path / "m", 1)
    before = contents(place)
    now = {"recipe": {"bits": 3, "rules": ["a", "c"], "group": 64}, "tokens": "ab"}
    with pytest.raises(MismatchError) as caught:
        again(tmp_path / "m", fingerprint=now)
    assert str(caught.value).splitlines()[1:-1] == [
        '  jaxq: was "1", is not given',
        "  recipe.bits: was 4, is 3",
        "  recipe.group: was not given, is 64",
        '  recipe.rules[1]: was "b", is "c"',
        '  tokens: was not given, is "ab"',
    ]
    assert "--force" in str(caught.value)
    assert contents(place) == before
    with pytest.raises(MismatchError, match="\n  and 30 more\n"):
        again(tmp_path / "m", fingerprint={str(i): i for i in range(48)})
    assert list(journal.differences([1], [True])) == ["[0]: was 1, is true"]
    assert list(journal.differences([1], [1, 2])) == ["it: was [1], is [1, 2]"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(MissingFileError, match=r"nothing to resume: .*m\.partial"):
        again(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    begun(tmp_path / "m", 2)
    with again(tmp_path / "m") as writer:
        writer.finish(tree(2))
    with pytest.raises(MissingFileError, match="nothing to resume"):
        again(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


def test_what_is_there_is_not_begun_again_without_leave(tmp_path):
    place = begun(tmp_path / "m", 2)
    before = contents(place)
    with pytest.raises(ExistsError, match=r"2 finished steps.*--resume.*--force"):
        open_stream(tmp_path / "m", fingerprint=PRINT)
    assert contents(place) == before
    with open_stream(tmp_path / "m", fingerprint=0, overwrite=True) as writer:
        assert writer.steps == []
        steps(writer, 0)
        writer.finish(tree(1))
    with pytest.raises(ExistsError, match="overwrite=True"):
        open_stream(tmp_path / "m", fingerprint=PRINT)
    assert os.listdir(tmp_path) == ["m"]
    assert list(load(tmp_path / "m")) == ["layer0"]


def test_an_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path):
    old = contents(save(tmp_path / "m", {"old": np.ones(3)}))
    begun(tmp_path / "m", 1, overwrite=True)
    assert contents(tmp_path / "m") == old
    with pytest.raises(ExistsError, match="overwrite=True"):
        again(tmp_path / "m")
    with again(tmp_path / "m", overwrite=True) as writer:
        steps(writer, 1)
        assert contents(tmp_path / "m") == old
        writer.finish(tree(2))
    assert list(load(tmp_path / "m")) == ["layer0", "layer1"]
    assert os.listdir(tmp_path) == ["m"]


def test_foreign_folders_are_never_touched(tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.txt").write_text("it was a dark night")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ExistsError, match=r"holds thesis\.txt and no journal"):
            open_stream(tmp_path / "m", fingerprint=0, **options)
    (tmp_path / "n.partial").write_text("a file")
    with pytest.raises(ExistsError, match="is a file"):
        open_stream(tmp_path / "n", fingerprint=0)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("it was a dark night")
    with pytest.raises(ExistsError, match="no intact checkpoint"):
        open_stream(tmp_path / "o", fingerprint=0, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["m.partial", "n.partial", "o"]
    assert os.listdir(tmp_path / "m.partial") == ["thesis.txt"]


def test_a_target_that_appears_meanwhile(tmp_path):
    with open_stream(tmp_path / "m", fingerprint=PRINT) as writer:
        steps(writer, 0)
        old = contents(save(tmp_path / "m", {"old": np.ones(3)}))
        with pytest.raises(ExistsError, match="overwrite=True"):
            writer.finish(tree(1))
    assert contents(tmp_path / "m") == old
    with again(tmp_path / "m", overwrite=True) as writer:
        writer.finish(tree(1))
    assert list(load(tmp_path / "m")) == ["layer0"]


# ------------------------------------------------------------------ damage


def assert_not_resumable(target, error, match):
    before = contents(target.parent)
    with pytest.raises(error, match=match) as caught:
        again(target)
    assert "Begin again with overwrite=True (--force)" in str(caught.value)
    assert type(caught.value) is error
    assert contents(target.parent) == before


def test_a_damaged_journal(tmp_path, rng):
    place = begun(tmp_path / "m", 2)
    path = place / "journal.json"
    data = path.read_bytes()
    for position in rng.integers(0, len(data), 20):
        bad = bytearray(data)
        bad[position] ^= 1 << int(rng.integers(7))
        path.write_bytes(bad)
        for resume in (True, False):
            with pytest.raises(CheckpointError, match=r"journal\.json.*--force"):
                again(tmp_path / "m", resume=resume)
        assert path.read_bytes() == bad
    for keep in (0, 10, -2):
        path.write_bytes(data[:keep])
        assert_not_resumable(tmp_path / "m", CorruptError, r"journal\.json")
    content = json.loads(data)
    content["format_version"] = 2
    path.write_text(json.dumps(content))
    assert_not_resumable(tmp_path / "m", VersionError, r"version 2, written by")
    with again(tmp_path / "m", resume=False, overwrite=True) as writer:
        assert writer.steps == []


def reseal(path, change):
    """Change the journal and make its checksum right, as nobody should."""
    content = json.loads(path.read_text())
    change(content)
    content["sha256"] = manifest.digest(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["steps"].append(3), "not an object"),
        (lambda c: c["steps"][0].pop("name"), "has no 'name'"),
        (lambda c: c.update(state={"file": "../x"}), "no plain name"),
        (lambda c: c["steps"][0].update(files={"/etc/x": {}}), "no plain name"),
        (lambda c: c["state"].update(bytes=-1, sha256="0"), "which is none"),
        (lambda c: c["state"]["tensors"].update(x={"kind": "value", "value": 1}), "no"),
        (lambda c: c["steps"][0]["parameters"].update(z=1), "not an object"),
    ],
)
def test_a_journal_that_is_believed_no_further_than_checked(tmp_path, change, words):
    place = begun(tmp_path / "m", 1)
    reseal(place / "journal.json", change)
    assert_not_resumable(tmp_path / "m", CorruptError, words)


def test_damaged_files(tmp_path):
    place = begun(tmp_path / "m", 2)
    shard = place / "model" / "model-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert_not_resumable(tmp_path / "m", CorruptError, rf"{shard.name} is truncated")
    shard.unlink()
    assert_not_resumable(tmp_path / "m", MissingFileError, f"lacks {shard.name}")
    shard.write_bytes(data.replace(b"layer1/a", b"layer1/z"))
    assert_not_resumable(tmp_path / "m", MismatchError, "layer1/z")
    shard.write_bytes(data)
    state = place / "state-00002.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[:-1] + b"!")
    assert_not_resumable(tmp_path / "m", CorruptError, r"state-00002.* were written")
    state.unlink()
    assert_not_resumable(tmp_path / "m", MissingFileError, "state-00002")
    state.write_bytes(data)
    again(tmp_path / "m").close()


def test_altered_numbers_are_noticed_when_loaded(tmp_path):
    place = begun(tmp_path / "m", 2)
    shard = place / "model" / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with again(tmp_path / "m") as writer:
        writer.finish(tree(2))
    with pytest.raises(CorruptError, match="sha256"):
        load(tmp_path / "m")


# ------------------------------------------------------------------ two at once


def test_one_process_at_a_time(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from jaxq.checkpoints import lock\n"
        "lock.acquire(Path(sys.argv[1]), Path(sys.argv[1]))\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    place = begun(tmp_path / "m", 1)
    before = contents(place)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for options in ({}, {"resume": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(BusyError, match=rf"its id is {other.pid}\)"):
                again(tmp_path / "m", **options)
        assert {**contents(place), "lock": b""} == {**before, "lock": b""}
        other.kill()
    again(tmp_path / "m").close()


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path):
    """Its last holder finished, and removed the folder under whoever waited."""
    handle = lock.acquire(tmp_path / "p", tmp_path)
    real, opened = os.open, []

    def open_then_finish(path, *rest):
        opened.append(real(path, *rest))
        if len(opened) == 1:
            (tmp_path / "p" / "lock").unlink()
            (tmp_path / "p").rmdir()
            os.close(handle)
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_then_finish)
        mine = lock.acquire(tmp_path / "p", tmp_path)
    assert len(opened) == 2
    assert os.path.samestat(os.fstat(mine), (tmp_path / "p" / "lock").stat())
    with pytest.raises(BusyError):
        lock.acquire(tmp_path / "p", tmp_path)
    os.close(mine)


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(UnsupportedError, match=r"use jaxq\.save"):
        open_stream(tmp_path / "m", fingerprint=0)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ misuse


def test_misuse(tmp_path):
    with pytest.raises(UnsupportedError, match="backend='orbax'"):
        open_stream(tmp_path / "m", fingerprint=0, backend="orbax")
    with pytest.raises(ValueError, match="shard_bytes=0"):
        open_stream(tmp_path / "m", fingerprint=0, shard_bytes=0)
    with pytest.raises(UnsupportedError, match="fingerprint must be plain data"):
        open_stream(tmp_path / "m", fingerprint={"a": len})
    with open_stream(tmp_path / "m", fingerprint=0) as writer:
        steps(writer, 0)
        with pytest.raises(ValueError, match="'step 0' was committed before"):
            writer.commit("step 0")
        with pytest.raises(ValueError, match="'layer0/a' was put before"):
            writer.put(("layer0", "a"), np.ones(3))
        writer.put("w", variants("int4")["group"])
        with pytest.raises(ValueError, match="'w/codes' was put before"):
            writer.put("w/codes", np.ones(3))
        with pytest.raises(UnsupportedError, match="is of type object"):
            writer.put("v", object())
        with pytest.raises(UnsupportedError, match="a state holds arrays"):
            writer.commit("w", {"x": 3})
        with pytest.raises(UnsupportedError, match="evidence of step 'w' must be"):
            writer.commit("w", None, {"loss": float("nan")})
        with pytest.raises(ValueError, match=r"1 parameters were put after .* 'w'"):
            writer.finish({"w": 0, **tree(1)})
        writer.commit("w")
        with pytest.raises(MismatchError, match="'w' is not in the tree"):
            writer.finish(tree(1))
        with pytest.raises(MismatchError, match="'v' was not put"):
            writer.finish({"v": 0, "w": 0, **tree(1)})
        with pytest.raises(MismatchError, match=r"'w' was put with shape \(48, 32\)"):
            writer.finish({"w": np.ones((32, 48)), **tree(1)})
        with pytest.raises(UnsupportedError, match="extra_files has"):
            writer.finish({"w": 0, **tree(1)}, extra_files={"journal/../x": ""})
        writer.finish({"w": 0, **tree(1)})
    assert load(tmp_path / "m")["w"].shape == (48, 32)
