"""Write a folder completely or not at all."""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxq.checkpoints.errors import CheckpointError, ExistsError, WriteError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(
    target: Path, needed: int, may_replace: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place once all went well.

    Everything is on the disk (fsync) before it gets its name, and an old target is
    exchanged for the new one in one step. Whatever ends the block early, Ctrl-C
    included, removes the new folder and leaves the old target as it was.

    Args:
        target: where the folder shall be; an empty folder there is no obstacle.
        needed: about how many bytes it will have, for messages.
        may_replace: called with an existing target, raises if it must not be replaced;
            None: no target may.

    Raises:
        ExistsError: the target exists and may not be replaced.
        WriteError: the disk is full, or not writable.
    """
    target = resolved(target)
    refuse(target, may_replace)
    temporary = _beside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent, needed)
        temporary.mkdir()
        yield temporary
        sync(temporary)
        refuse(target, may_replace)
        publish(temporary, target)
        sync_folder(target.parent)
    except CheckpointError:
        raise
    except OSError as error:
        remove(temporary)
        raise _write_error(target, needed, error) from error
    finally:
        remove(temporary)


def resolved(target: Path) -> Path:
    """Return where a folder is really made: what is a link is followed."""
    return target.resolve() if target.is_symlink() else target.absolute()


def refuse(target: Path, may_replace: Callable[[Path], None] | None) -> None:
    """Raise `ExistsError` unless ``target`` may be made, see `new_folder`."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ExistsError(f"{target} is a file; name a folder that does not exist yet")
    if not any(target.iterdir()):
        return
    if may_replace is None:
        raise ExistsError(
            f"{target} exists; save elsewhere, or pass overwrite=True (--force) to "
            "replace it"
        )
    may_replace(target)


def remove(folder: Path) -> None:
    """Remove a folder, even if Ctrl-C comes now."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_room(parent: Path, needed: int) -> None:
    """Raise `OSError` now rather than after an hour of writing, if the disk says so."""
    disk = shutil.disk_usage(parent)
    if disk.total and disk.free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def room(target: Path) -> int:
    """Return the free bytes on the disk where a folder is to be made."""
    place = next(p for p in target.parents if p.exists())
    return shutil.disk_usage(place).free


def _write_error(target: Path, needed: int, error: OSError) -> WriteError:
    return WriteError(
        error.errno,
        f"could not write {target}: {error.strerror or error}. It needs about "
        f"{needed:,} bytes, and {room(target):,} are free there. What was there before "
        "is untouched, and nothing partial is left; make room, or save elsewhere",
    )


def publish(temporary: Path, target: Path) -> None:
    """Give ``temporary`` the name ``target``; an old target ends up under the other."""
    if not target.exists() or not any(target.iterdir()):
        temporary.rename(target)
        return
    if _exchange(temporary, target):
        return
    # No such system call here: two steps, and back again if the second one fails.
    old = _beside(target, "old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return renameat2(*names, _RENAME_EXCHANGE) == 0


def _beside(target: Path, ending: str) -> Path:
    """Return a name on the same file system that nobody else takes."""
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.{unique}.{ending}")


def sync(folder: Path) -> None:
    """Wait until every file below ``folder`` is on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where systems allow that."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
