"""The files that hold the numbers: are they there, and as they were written?"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from jaxq.checkpoints.errors import CorruptError, MissingFileError
from jaxq.checkpoints.manifest import DataFile, Manifest


def fingerprint(path: Path) -> DataFile:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return DataFile(file.tell(), digest.hexdigest())


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that every data file is there in full, without reading it.

    Raises:
        MissingFileError: one is missing.
        CorruptError: one has another size than was written.
    """
    missing = [name for name in manifest.files if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(manifest.files)} "
            "data files are missing); fetch what is missing, or save it again"
        )
    for name, expected in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != expected.bytes:
            what = "is truncated" if size < expected.bytes else "was altered"
            raise CorruptError(
                f"{folder / name} {what}: it has {size} bytes, and {expected.bytes} "
                "were written; fetch or save it again"
            )


def check_contents(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check the SHA-256 of data files, which reads them once.

    Raises:
        CorruptError: one has other bytes than were written.
    """
    for name in names:
        found, expected = fingerprint(folder / name).sha256, manifest.files[name].sha256
        if found != expected:
            raise CorruptError(
                f"{folder / name} was altered after it was written: its sha256 is "
                f"{found}, and {expected} was written; fetch or save it again"
            )
