"""What every benchmark prints, and the file it leaves."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table of strings.

    Attributes:
        title: one line above it.
        columns: their names; the first column is aligned left, the others right.
        rows: one string per column.
        notes: lines below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the table in Markdown, its columns aligned for reading as text."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]

        def line(row: Sequence[str]) -> str:
            padded = [row[0].ljust(widths[0])]
            padded += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            return "| " + " | ".join(padded) + " |"

        rules = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
        out = [self.title, "", line(self.columns), line(rules)]
        out += [line(row) for row in self.rows]
        return [*out, *([""] if self.notes else []), *self.notes]


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the tables as Markdown too (the kept ones are benchmarks/results/)",
    )
    return parser


def publish(
    name: str, about: str, tables: Sequence[Table], options: argparse.Namespace
) -> None:
    """Print the tables; with ``--out`` write them with date, machine and versions."""
    body = "\n\n".join("\n".join(table.lines()) for table in tables)
    flags = " --quick" if options.quick else ""
    head = [
        f"# {name}",
        "",
        about,
        "",
        f"`python -m benchmarks.{name}{flags}`, {datetime.date.today()}, {machine()}.",
    ]
    text = "\n".join(head) + "\n\n" + body + "\n"
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def machine() -> str:
    """Return processor, cores, Python and the versions that matter, in one line."""
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return ", ".join(
        (
            processor(),
            f"{cores or os.cpu_count()} cores",
            f"Python {platform.python_version()}",
            *versions,
        )
    )


def processor() -> str:
    """Return the processor's name, with what makes small integer products fast."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in info.open())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = fields.get("flags", "").split()
    extras = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f in flags]
    return f"{fields.get('model name', platform.machine())} ({' '.join(extras)})"


def milliseconds(seconds: float) -> str:
    """Return a time with three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def ratio(a: float, b: float) -> str:
    """Return ``a / b`` with two decimals."""
    return f"{a / b:.2f}"
