"""What can be wrong with a checkpoint; every class is a `CheckpointError`."""


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or not what its config says."""


class CorruptError(CheckpointError):
    """A file does not hold the bytes that were written: truncated, altered, no JSON."""


class MismatchError(CheckpointError):
    """Two things that should agree do not: manifest and tensors, or file and `like`."""


class VersionError(CheckpointError):
    """The checkpoint was written by a newer jaxq, in a format this one cannot read."""


class UnsupportedError(CheckpointError):
    """A tree holds something that no checkpoint can: a function, a tracer, a key."""


class MissingFileError(FileNotFoundError, CheckpointError):
    """A folder or one of its files is not there."""


class ExistsError(FileExistsError, CheckpointError):
    """The target exists and may not be replaced."""


class BusyError(CheckpointError):
    """Another process is writing the same checkpoint."""


class WriteError(OSError, CheckpointError):
    """Writing failed (full disk, no permission); what was there before is untouched."""
