"""`jaxq inspect`: what a folder holds, without reading its numbers."""

from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.table import Table

from jaxq.checkpoints import Summary, is_jaxq_checkpoint
from jaxq.checkpoints import inspect as summarize
from jaxq.cli.failures import guarded
from jaxq.cli.options import Debug, Json
from jaxq.cli.screen import print_json, results, size
from jaxq.evaluate import bits_per_weight, parameter_count, stored_bytes
from jaxq.lm import LM, load_model


@guarded
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model's folder, or [bold]demo[/].")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show every parameter of a model: how it is stored, and in how many bits.

    Files are checked for being there and whole; numbers are not read.

    [bold]Examples[/]
      jaxq inspect small
      jaxq inspect demo --json
    """
    if is_jaxq_checkpoint(path):
        summary = summarize(path)
        facts, rows = summary.to_dict(), _quantized_rows(summary)
        title = f"{Path(path).name}: {summary.backend}, written by {summary.written_by}"
    else:
        lm = load_model(path, weights=False)
        rows = _float_rows(lm)
        facts, title = _float_facts(path, lm, rows), f"{lm.name}: a float model"
    if as_json:
        print_json(facts)
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
    console = results()
    console.print(table)
    console.print(
        f"{facts['parameters']:,} parameters in {size(facts['bytes'])}: "
        f"[bold]{facts['bits_per_weight']:.3f}[/] bits per weight over all"
    )


Row = tuple[str, tuple[int, ...], str, int, float]


def _quantized_rows(summary: Summary) -> list[Row]:
    return [(r.path, r.shape, r.spec, r.bytes, r.bits_per_weight) for r in summary.rows]


def _float_rows(lm: LM) -> list[Row]:
    flat, _ = jax.tree_util.tree_flatten_with_path(lm.params)
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            tuple(leaf.shape),
            leaf.dtype.name,
            stored_bytes(leaf),
            bits_per_weight(leaf),
        )
        for path, leaf in flat
    ]


def _float_facts(path: str, lm: LM, rows: list[Row]) -> dict[str, Any]:
    names = ("path", "shape", "spec", "bytes", "bits_per_weight")
    return {
        "path": path,
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
        "recipe": None,
        "parameters": parameter_count(lm.params),
        "bytes": stored_bytes(lm.params),
        "bits_per_weight": bits_per_weight(lm.params),
    }
