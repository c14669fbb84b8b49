"""One process at a time: a lock that the system drops when its holder dies."""

import os
from pathlib import Path
from types import ModuleType

from jaxq.checkpoints.errors import BusyError, UnsupportedError

NAME = "lock"


def acquire(folder: Path, target: Path) -> int:
    """Make ``folder`` if it is not there, and lock it.

    Args:
        folder: to be worked in by this process alone.
        target: what the work is for, for messages.

    Returns:
        An open file; closing it, or the end of the process, gives the lock back.

    Raises:
        BusyError: another process holds the lock.
        UnsupportedError: the system has no such locks.
    """
    fcntl = _fcntl(target)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder was done just now, and removed the folder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, folder / NAME):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
        except BlockingIOError as error:
            holder = os.pread(handle, 20, 0).decode(errors="replace") or "unknown"
            os.close(handle)
            raise BusyError(
                f"{target} is being written by another process (its id is {holder}), "
                f"which works in {folder}; wait for it, or write elsewhere"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _fcntl(target: Path) -> ModuleType:
    try:
        import fcntl
    except ImportError as error:
        raise UnsupportedError(
            f"{target} cannot be written step by step here: this system has no file "
            "locks (fcntl); use jaxq.save"
        ) from error
    return fcntl


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)
