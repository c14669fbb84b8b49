"""A run in steps that is killed wherever that is possible, and resumed until it ends.

`python interrupted.py FOLDER` wants a checkpoint FOLDER/sample to take shapes from;
with a further word another folder is made of the checkpoint in the end.
Every step's numbers come from the state before it, so a wrong state shows in the end.
Children are forked: to start Python and import JAX for each would take seconds.
"""

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import ExistsError, load_abstract, open_stream, safetensors
from jaxq.checkpoints.partial import beside

STEPS = 2
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir"}


def filled(abstract: Any, seed: int) -> Any:
    """Random bytes, in NumPy: a forked child must not use JAX."""
    rng = np.random.default_rng(seed)

    def one(a: Any) -> np.ndarray:
        data = rng.integers(0, 256, a.size * a.dtype.itemsize, dtype=np.uint8)
        return data.view(a.dtype).reshape(a.shape)

    return jax.tree.map(one, abstract)


def work(target: Path, sample: Any) -> None:
    """Write the checkpoint, or what is left to write of it."""
    if target.exists() and not beside(target).exists():
        return
    resume = (beside(target) / "journal.json").exists()
    with open_stream(
        target, fingerprint={"seed": 0}, shard_bytes=3000, resume=resume
    ) as writer:
        number = int(writer.state()["number"][0]) if writer.steps else 1
        for step in range(len(writer.steps), STEPS):
            for name, leaf in sample.items():
                writer.put(("layers", str(step), name), filled(leaf, number))
            number = (number * 31 + step) % 2**31
            state = {"number": np.array([number]), "x": np.full(2000, number)}
            writer.commit(f"layers {step}", state, {"number": number})
        tree = {"layers": {str(step): dict(sample) for step in range(STEPS)}}
        metadata = {"evidence": writer.evidence()}
        convert = converted if len(sys.argv) > 2 else None
        writer.finish(
            tree, metadata=metadata, extra_files={"a.json": "{}"}, convert=convert
        )


def converted(model: Path, folder: Path) -> None:
    """Write the checkpoint's numbers into one file, by way of another."""
    with (folder / "spool").open("wb") as spool:
        for path in sorted(model.glob("*.safetensors")):
            spool.write(path.read_bytes())
    (folder / "spool").rename(folder / "model.bin")
    (folder / "config.json").write_text("{}")


def child(target: Path, sample: Any, prepare: Callable[[], None]) -> int:
    """Work in a process of its own; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        prepare()
        work(target, sample)
        status = 0
    except ExistsError:
        status = 0 if target.exists() else 1
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> bool:
    """Wait for a child; whether it came to its end rather than being killed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def kill_at(event: int) -> None:
    """Die as if killed, just before the given number of operations on files is done."""
    left = [event]

    def hook(name: str, args: object) -> None:
        if name in EVENTS:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
    }


def main(folder: Path) -> None:
    safetensors.CHUNK = 512  # many small writes, to be killed between
    os.fsync = lambda handle: None  # slow, and a killed process loses nothing
    gc.freeze()  # what is not touched need not be copied for each child
    sample = load_abstract(folder / "sample")
    done = folder / "uninterrupted" / "model"
    start = time.monotonic()
    assert ended(child(done, sample, lambda: None))
    seconds = time.monotonic() - start
    reference = digest(done)
    place = folder / "killed"
    target = place / "model"

    def check(pid: int) -> None:
        assert ended(pid)
        # A death between the last two operations leaves a trace, for the next run.
        if os.listdir(place) != ["model"]:
            assert ended(child(target, sample, lambda: None))
        assert os.listdir(place) == ["model"], os.listdir(place)
        assert digest(target) == reference
        shutil.rmtree(place)

    # Once at every operation ...
    event, finished = 1, False
    while not finished:
        finished = ended(child(target, sample, partial(kill_at, event)))
        check(child(target, sample, lambda: None))
        event += 1
    # ... and again and again, after few operations and after random times.
    rng, deaths = random.Random(0), 0
    most = event if len(sys.argv) > 2 else 50  # a conversion begins anew every time
    for _ in range(3):
        while not ended(
            child(target, sample, partial(kill_at, rng.randrange(9, most)))
        ):
            deaths += 1
        check(child(target, sample, lambda: None))
    for _ in range(5):
        for _ in range(2):
            pid = child(target, sample, lambda: None)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            deaths += not ended(pid)
        check(child(target, sample, lambda: None))
    print(json.dumps({"events": event - 1, "deaths": deaths, "files": reference}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
