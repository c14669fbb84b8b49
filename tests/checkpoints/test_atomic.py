"""A checkpoint is written completely or not at all, and nothing else is ever lost."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.checkpoints import (
    ExistsError,
    WriteError,
    atomic,
    load,
    orbax,
    safetensors,
    save,
)
from jaxq.checkpoints.backends import BACKENDS
from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from tests.checkpoints.trees import contents

backends = pytest.mark.parametrize("backend", BACKENDS)

OLD = {"x": np.arange(10, dtype=np.int32)}
NEW = {f"x{i}": np.arange(250_000, dtype=np.int32) for i in range(8)}


@pytest.fixture
def old(tmp_path: Path, backend: str) -> Path:
    return save(tmp_path / "model", OLD, backend=backend)


def assert_untouched(old: Path, before: dict[str, bytes]) -> None:
    assert os.listdir(old.parent) == ["model"]
    assert contents(old) == before
    np.testing.assert_array_equal(load(old)["x"], OLD["x"])


@backends
def test_full_disk(tmp_path, backend, old, capfd):
    """The system itself refuses to write on: here a limit on the size of files."""
    before = contents(old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in (old, tmp_path / "other"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        try:
            with pytest.raises(
                WriteError, match=r"8,000,000 bytes.*make room"
            ) as caught:
                save(target, NEW, backend=backend, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(target) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, CheckpointError)
        assert_untouched(old, before)
    assert not "".join(capfd.readouterr()), "quiet"


def test_orbax_threads_write_on_after_a_failure(tmp_path, monkeypatch):
    """They make the folder again, so it is removed until they are done."""
    folder, clock, made = tmp_path / "partial", [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] < 3 and len(made) < clock[0] / 0.3:  # every 0.3 seconds
            (folder / "d").mkdir(parents=True)  # fails unless it was removed
            made.append(clock[0])

    fake = types.SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr(orbax, "time", fake)
    orbax._settle(folder, calm=0.5)
    assert len(made) == 10
    assert not folder.exists()
    assert made[-1] + 0.5 <= clock[0] < made[-1] + 1


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_orbax(times):
    """What Orbax's threads still write must not appear after the folder is removed."""
    events = []

    def slow() -> None:
        with orbax._ctrl_c_later():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            events.append("written")

    with pytest.raises(KeyboardInterrupt):
        slow()
    assert events == (["written"] if times == 1 else [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("backend", ["safetensors"])
def test_full_disk_after_some_tensors(old, backend, monkeypatch):
    before, written = contents(old), []

    def full(array: object) -> np.ndarray:
        written.append(array)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return np.asarray(array)

    monkeypatch.setattr("jaxq.checkpoints.placement.fetch", full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        save(old, NEW, overwrite=True, shard_bytes=1_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert_untouched(old, before)


@backends
def test_full_disk_is_seen_before_writing(old, backend, monkeypatch):
    before = contents(old)
    monkeypatch.setattr(
        atomic.shutil, "disk_usage", lambda path: type(USAGE)(10**9, 10**9 - 5, 5)
    )
    with pytest.raises(WriteError, match="8,000,000 bytes, and 5 are free"):
        save(old, NEW, backend=backend, overwrite=True)
    assert_untouched(old, before)


USAGE = atomic.shutil.disk_usage("/")


@backends
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_ctrl_c(old, backend, delay):
    """A real SIGINT, wherever it strikes: the old checkpoint, or the whole new one."""
    before = contents(old)
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))

    def save_until_then() -> None:
        timer.start()
        save(old, NEW, backend=backend, overwrite=True)
        timer.join()

    with pytest.raises(KeyboardInterrupt):
        save_until_then()
    assert os.listdir(old.parent) == ["model"]
    if contents(old) != before:
        assert sorted(load(old)) == sorted(NEW)


@pytest.mark.parametrize("backend", ["safetensors"])
def test_ctrl_c_in_the_middle(old, backend, monkeypatch):
    before = contents(old)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(old, NEW, overwrite=True)
    assert_untouched(old, before)


def test_killed(tmp_path):
    """SIGKILL leaves no folder of that name; the leftovers never look like one."""
    code = (
        "import os, signal, numpy as np\n"
        "from jaxq.checkpoints import atomic, save\n"
        "atomic.sync = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"save({str(tmp_path / 'model')!r}, {{'x': np.ones(3)}})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.")
    assert left.name.endswith(".partial")
    save(tmp_path / "model", OLD)
    np.testing.assert_array_equal(load(tmp_path / "model")["x"], OLD["x"])


@backends
def test_an_existing_target_is_refused(old, backend):
    before = contents(old)
    with pytest.raises(ExistsError, match="overwrite=True"):
        save(old, NEW, backend=backend)
    with pytest.raises(FileExistsError):
        save(old, NEW, backend=backend)
    assert_untouched(old, before)


@backends
def test_overwrite(old, backend):
    for target in BACKENDS:
        save(old, {"new": jnp.ones(3)}, backend=target, overwrite=True)
        assert os.listdir(old.parent) == ["model"]
        assert list(load(old)) == ["new"]


@backends
@pytest.mark.parametrize("fails", [False, True])
def test_overwrite_without_the_system_call(old, backend, fails, monkeypatch):
    """Where two names cannot be exchanged in one step, a failing step is undone."""
    before = contents(old)
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    if not fails:
        save(old, {"new": jnp.ones(3)}, backend=backend, overwrite=True)
        assert os.listdir(old.parent) == ["model"]
        assert list(load(old)) == ["new"]
        return
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EPERM, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WriteError, match="could not write"):
        save(old, {"new": jnp.ones(3)}, overwrite=True)
    assert_untouched(old, before)


def test_the_exchange_is_one_step_on_linux(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "was_a").touch()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "b" / "was_a").exists()


def test_foreign_folders_are_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("it was a dark night")
    with pytest.raises(ExistsError, match="no intact checkpoint"):
        save(tmp_path / "thesis", OLD, overwrite=True)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExistsError, match="is a file"):
        save(tmp_path / "file", OLD, overwrite=True)
    folder = save(tmp_path / "model", OLD)
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ExistsError, match=r"notes\.md"):
        save(folder, NEW, overwrite=True)
    assert (folder / "notes.md").read_text() == "mine"
    assert (tmp_path / "thesis" / "chapter1.txt").exists()


def test_what_may_be_in_the_way(tmp_path):
    """An empty folder, a missing parent, a link to another disk."""
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", OLD)
    save(tmp_path / "a" / "b" / "c", OLD)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", OLD)
    save(tmp_path / "link", NEW, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(load(tmp_path / "real")) == sorted(NEW)


def test_permissions_are_the_usual_ones(tmp_path):
    mask = os.umask(0o022)
    os.umask(mask)
    folder = save(tmp_path / "model", OLD)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


@backends
@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"f": len}}, "a/f.*builtin_function.*take it out"),
        ({"a": np.array(["x"])}, "dtype str"),
        ({"a": np.array([object()])}, "dtype object"),
        ({"a": float("nan")}, "a is the float nan; make it an array"),
    ],
)
def test_what_cannot_be_saved(tmp_path, tree, words, backend):
    with pytest.raises(UnsupportedError, match=words):
        save(tmp_path / "model", tree, backend=backend)
    assert not list(tmp_path.iterdir())


def test_changed_while_saving(tmp_path, monkeypatch):
    """A mutable array that another thread resizes is an error, not a damaged file."""
    monkeypatch.setattr("jaxq.checkpoints.placement.fetch", lambda a: np.zeros(3))
    with pytest.raises(CheckpointError, match="changed while it was saved"):
        save(tmp_path / "model", OLD)
    assert not list(tmp_path.iterdir())


def test_one_tensor_in_memory_at_a_time(tmp_path, monkeypatch):
    """Sixteen tensors of 4 MB cost about one of them."""
    import tracemalloc

    arrays = {str(i): jnp.full((1 << 20,), i, jnp.float32) for i in range(16)}
    monkeypatch.setattr(
        safetensors.np, "ascontiguousarray", lambda a: np.array(a, copy=True)
    )
    tracemalloc.start()
    save(tmp_path / "model", arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * (4 << 20)
