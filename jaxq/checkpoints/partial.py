"""`NAME.partial`: the folder in which a checkpoint grows until it gets its name.

It holds `model/`, the checkpoint as far as it is; `journal.json`, which says how far
that is; `state-*.safetensors`, what the next step starts from; `converted/`, what is
made of the finished checkpoint where another folder than itself is wanted; and `lock`.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from jaxq.checkpoints import (
    atomic,
    data_files,
    journal,
    lock,
    manifest,
    shards,
)
from jaxq.checkpoints.errors import (
    CheckpointError,
    CorruptError,
    ExistsError,
    MissingFileError,
)
from jaxq.checkpoints.journal import Journal

MODEL, CONVERTED = "model", "converted"
# Raises if what is at a path must not be replaced; None: nothing may be.
Replace = Callable[[Path], None] | None
_OURS = {MODEL, CONVERTED, lock.NAME, journal.NAME, journal.NEXT}


def beside(target: Path) -> Path:
    """Return the folder in which ``target`` grows."""
    return target.with_name(f"{target.name}.partial")


def check_name(place: Path) -> None:
    """Raise unless the folder is free, or was made here.

    Raises:
        ExistsError: it holds what is not of an unfinished checkpoint.
    """
    if place.exists() and not place.is_dir():
        raise ExistsError(f"{place} is a file, in the way of a folder; remove it")
    if not place.is_dir() or (place / journal.NAME).exists():
        return
    foreign = sorted(p.name for p in place.iterdir() if not _is_ours(p.name))
    if foreign:
        raise ExistsError(
            f"{place}, where the checkpoint would grow, holds {', '.join(foreign[:3])} "
            "and no journal; move it away, or write elsewhere"
        )


def begin(
    place: Path, target: Path, fingerprint: object, may_replace: Replace
) -> Journal:
    """Return an empty journal in an empty folder.

    Raises:
        ExistsError: the target exists, or was begun already, and may not be replaced.
    """
    atomic.refuse(target, may_replace)
    steps = 0 if may_replace else len(_read(place, target).steps)
    if steps:
        raise ExistsError(
            f"{target} was begun before: {place} holds {steps} finished steps of it. "
            "Continue with resume=True (--resume), or begin again with overwrite=True "
            "(--force), which removes them"
        )
    _clear(place)
    (place / MODEL).mkdir()
    fresh = Journal(fingerprint)
    journal.write(place, fresh)
    return fresh


def resume(
    place: Path, target: Path, fingerprint: object, may_replace: Replace
) -> Journal:
    """Return the journal of an unfinished checkpoint, all of which was checked.

    Sizes, headers and the checksum of the state are compared with the journal; the
    checksums of the parameters are compared when the finished checkpoint is loaded.

    Raises:
        MissingFileError: nothing was begun, or a file is missing.
        CorruptError: a file is damaged.
        MismatchError: it was begun with another fingerprint.
        ExistsError: the target exists and may not be replaced, or is finished.
    """
    if not (place / journal.NAME).exists():
        remedy = (
            f"{target} is there already, so that run may well have finished"
            if target.exists()
            else "run without resume=True (--resume)"
        )
        raise MissingFileError(
            f"there is nothing to resume: {place} does not exist, or nothing was "
            f"written there yet; {remedy}"
        )
    found = _read(place, target)
    if is_published(found, target):
        raise ExistsError(f"{target} is finished, there is nothing to resume")
    atomic.refuse(target, may_replace)
    journal.check_fingerprint(found, fingerprint, str(target))
    settle(place, found)
    try:
        _check_files(place, found)
    except CheckpointError as error:
        raise type(error)(_not_resumable(target, error)) from error
    return found


def settle(place: Path, found: Journal) -> None:
    """Remove what an unfinished step left."""
    (place / MODEL).mkdir(exist_ok=True)
    for path in (place / MODEL).iterdir():
        if path.name not in found.files:
            _remove(path)
    state = found.state and found.state.file
    for path in place.iterdir():
        if path.name not in {MODEL, lock.NAME, journal.NAME, state}:
            _remove(path)


def tidy(place: Path, target: Path) -> None:
    """Remove the folder if there is nothing in it that one would want to resume."""
    with contextlib.suppress(CheckpointError, OSError):
        if (place / journal.NAME).exists():
            found = journal.read(place)
            if found.steps and not is_published(found, target):
                return
        discard(place)


def discard(place: Path) -> None:
    """Remove the folder; last what tells that its checkpoint is finished."""
    for path in place.iterdir():
        if path.name not in {journal.NAME, lock.NAME}:
            _remove(path)
    (place / journal.NAME).unlink(missing_ok=True)
    shutil.rmtree(place)


def is_published(found: Journal, target: Path) -> bool:
    """Whether the checkpoint got its name, and only its traces are left."""
    return (
        found.published is not None
        and target.is_dir()
        and seal(target) == found.published
    )


def seal(folder: Path) -> str:
    """Return what tells a finished folder from any other, in hexadecimal.

    Of a checkpoint the SHA-256 of its manifest, which has those of its files; of what
    was converted that of the names, sizes and times of its files.
    """
    path = folder / manifest.NAME
    if path.is_file():
        return data_files.fingerprint(path).sha256
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read(place: Path, target: Path) -> Journal:
    """Return the journal; an empty one where there is none."""
    if not (place / journal.NAME).exists():
        return Journal(None)
    try:
        return journal.read(place)
    except CheckpointError as error:
        raise type(error)(_not_resumable(target, error)) from error


def _check_files(place: Path, found: Journal) -> None:
    """Raise unless everything that the journal lists is there."""
    listed = manifest.Manifest("safetensors", None, found.params, found.files)
    data_files.check_sizes(place / MODEL, listed)
    shards.check_headers(place / MODEL, listed)
    if found.state is None:
        return
    path = place / found.state.file
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    data = data_files.fingerprint(path)
    if data != found.state.data:
        raise CorruptError(
            f"{path} has {data.bytes} bytes of sha256 {data.sha256}, and "
            f"{found.state.data.bytes} bytes of {found.state.data.sha256} were written"
        )


def _not_resumable(target: Path, error: Exception) -> str:
    reason, _, _ = str(error).partition("; fetch")  # which would not help here
    return (
        f"{target} cannot be resumed: {reason}. Begin again with overwrite=True "
        "(--force), which removes what was done"
    )


def _clear(place: Path) -> None:
    """Remove everything but the lock; first what makes it look resumable."""
    (place / journal.NAME).unlink(missing_ok=True)
    for path in place.iterdir():
        if path.name != lock.NAME:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_ours(name: str) -> bool:
    return name in _OURS or name.startswith("state-")
