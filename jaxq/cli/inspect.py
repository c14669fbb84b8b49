"""`jaxq inspect`: what a folder holds, without reading its numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from jaxq.checkpoints import Summary, is_jaxq_checkpoint
from jaxq.checkpoints import inspect as summarize
from jaxq.cli.evidence import evidence_lines, evidence_table
from jaxq.cli.failures import guarded
from jaxq.cli.options import Debug, Json
from jaxq.cli.screen import errors, print_json, results, size
from jaxq.evaluate import bits_per_weight, parameter_count, stored_bytes
from jaxq.lm import load_model
from jaxq.model import TIMINGS, Model
from jaxq.qtensor import is_qtensor
from jaxq.report import Evidence, read_evidence


@guarded
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model's folder, or [bold]demo[/].")
    ],
    evidence: Annotated[
        bool,
        typer.Option("--evidence", help="What calibration did to every weight."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show every parameter of a model: how it is stored, and in how many bits.

    Files are checked for being there and whole; numbers are not read. With
    [bold]--evidence[/] instead what calibration did to every weight: tokens seen, the
    loss of its product and that over rounding it to nearest, and what fell back.

    [bold]Examples[/]
      jaxq inspect small
      jaxq inspect small --evidence
      jaxq inspect demo --json
    """
    found = Evidence()
    if is_jaxq_checkpoint(path):
        summary = summarize(path)
        found = read_evidence(summary.metadata, _seconds(Path(path)))
        facts, rows = summary.to_dict(), _quantized_rows(summary)
        title = f"{Path(path).name}: {summary.backend}, written by {summary.written_by}"
    else:
        lm = load_model(path, weights=False)
        rows = _float_rows(lm)
        how = "a float model" if lm.codec == "float" else f"quantized, {lm.codec}"
        facts, title = _float_facts(path, lm, rows), f"{lm.name}: {how}"
    if as_json:
        print_json(facts | _evidence_facts(found))
        return
    console = results()
    if evidence:
        _print_evidence(found, console)
        return
    table = Table(title=title, title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("stored as", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    for name, shape, kind, stored, bits in rows:
        shown = "×".join(map(str, shape))
        table.add_row(name, shown, kind, f"{stored:,}", f"{bits:.3f}")
    console.print(table)
    console.print(
        f"{facts['parameters']:,} parameters in {size(facts['bytes'])}: "
        f"[bold]{facts['bits_per_weight']:.3f}[/] bits per weight over all"
    )
    if found:
        console.print(next(evidence_lines(found)))
        errors().print(f"[dim]more:[/] jaxq inspect {path} --evidence", highlight=False)


def _print_evidence(found: Evidence, console: Console) -> None:
    if not found:
        console.print(
            "no evidence: nothing here was calibrated (or not by a jaxq that notes it)",
            highlight=False,
        )
        return
    console.print(evidence_table(found))
    console.print()
    for line in evidence_lines(found):
        console.print(line)


def _seconds(folder: Path) -> dict[str, Any]:
    """Return how long each weight took, which lies beside the manifest, if at all."""
    try:
        found = json.loads((folder / TIMINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # a checkpoint is whole without it
    return found if isinstance(found, dict) else {}


def _evidence_facts(found: Evidence) -> dict[str, Any]:
    """Return the evidence for scripts: by path, totals, and what it was seen on."""
    return {
        "evidence": {
            tensor.path: dataclasses.asdict(tensor) | {"ratio": tensor.ratio}
            for tensor in (*found.tensors, *found.others)
        },
        "evidence_totals": found.totals() if found else None,
        "calibration": dict(found.calibration) or None,
    }


Row = tuple[str, tuple[int, ...], str, int, float]


def _quantized_rows(summary: Summary) -> list[Row]:
    return [(r.path, r.shape, r.spec, r.bytes, r.bits_per_weight) for r in summary.rows]


def _float_rows(lm: Model) -> list[Row]:
    flat, _ = jax.tree_util.tree_flatten_with_path(lm.params, is_leaf=is_qtensor)
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            tuple(leaf.shape),
            leaf.spec.describe() if is_qtensor(leaf) else leaf.dtype.name,
            stored_bytes(leaf),
            bits_per_weight(leaf),
        )
        for path, leaf in flat
    ]


def _float_facts(path: str, lm: Model, rows: list[Row]) -> dict[str, Any]:
    names = ("path", "shape", "spec", "bytes", "bits_per_weight")
    return {
        "path": path,
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
        "recipe": None,
        "parameters": parameter_count(lm.params),
        "bytes": stored_bytes(lm.params),
        "bits_per_weight": bits_per_weight(lm.params),
    }
