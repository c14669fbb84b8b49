"""`jaxq plan`: what quantizing would do, before anything is done."""

import itertools
import re
from typing import Annotated

import typer
from rich.table import Table

from jaxq.cli.failures import guarded
from jaxq.cli.options import Debug, GroupSize, Json, Model, RecipeName, read_recipe
from jaxq.cli.screen import errors, print_json, results, size
from jaxq.lm import load_model
from jaxq.plan import Plan, PlanRow


@guarded
def plan(
    model: Model,
    recipe: RecipeName,
    group_size: GroupSize = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Not there yet: a device to plan for."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="One row per parameter, layers not merged.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe would do to every parameter, and what it saves.

    Reads the model's config, not its weights.

    [bold]Examples[/]
      jaxq plan demo --recipe w4a16
      jaxq plan ./llama --recipe mine.yaml --all
    """
    chosen = read_recipe(recipe)
    if target is not None:
        raise typer.BadParameter(
            f"planning for {target!r} is not there yet; leave it out to see sizes",
            param_hint="--target",
        )
    with errors().status(f"tracing {model}"):
        found = load_model(model, weights=False).plan(chosen, group_size)
    if as_json:
        print_json(_facts(found))
        return
    console = results()
    console.print(_table(found, every))
    console.print(
        f"{len(found.quantized)} of {len(found)} parameters, {size(found.bytes_before)}"
        f" → [bold]{size(found.bytes_after)}[/], {found.bits_per_weight:.3f} bits per "
        f"weight over all"
    )


def _facts(found: Plan) -> dict[str, object]:
    return {
        "recipe": found.recipe.name,
        "bits_per_weight": found.bits_per_weight,
        "bytes_before": found.bytes_before,
        "bytes_after": found.bytes_after,
        "parameters": [
            {
                "path": row.path,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "ops": list(row.ops),
                "decision": row.decision,
                "bytes_before": row.bytes_before,
                "bytes_after": row.bytes_after,
                "reason": row.reason,
            }
            for row in found
        ],
    }


def _table(found: Plan, every: bool) -> Table:
    table = Table(title=f"plan: {found.recipe.name}", title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("becomes", overflow="fold")
    for name, rows in _merged(found, every):
        before, after = (
            sum(r.bytes_before for r in rows),
            sum(r.bytes_after for r in rows),
        )
        first = rows[0]
        remark = f"[dim]{first.reason}[/]" if first.reason else ""
        kept = not first.is_quantized
        decision = "[yellow]float[/]" if kept else first.decision
        table.add_row(
            name if len(rows) == 1 else f"{name} [dim]×{len(rows)}[/]",
            "×".join(map(str, first.shape)),
            size(before) if kept else f"{size(before)} → {size(after)}",
            f"{decision} {remark}".strip(),
        )
    return table


def _merged(found: Plan, every: bool) -> list[tuple[str, list[PlanRow]]]:
    """Return rows by name; layers of one fate are one row, a star for their number."""

    def key(row: PlanRow) -> tuple[str, ...]:
        name = row.path if every else re.sub(r"\d+", "*", row.path)
        return (name, str(row.shape), row.decision, row.reason)

    rows = sorted(found, key=key)
    groups = [list(rows) for _, rows in itertools.groupby(rows, key)]
    return [(g[0].path if len(g) == 1 else key(g[0])[0], g) for g in groups]
