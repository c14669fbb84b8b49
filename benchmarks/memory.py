"""How much memory a process takes."""

from pathlib import Path


def resident() -> float:
    """Return the MiB of this process that are in memory now."""
    return _status("VmRSS")


def peak() -> float:
    """Return the most MiB of this process that were in memory at once.

    Not `resource.getrusage`: its maximum is inherited from the process that started
    this one, however large that was.
    """
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[field].split()[0]) / 1024
