"""`jaxq compare`: several recipes on one model, side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jaxq.cli.failures import FELL_BACK, guarded
from jaxq.cli.options import Debug, GroupSize, Json, Model, read_recipe, read_text
from jaxq.cli.screen import errors, loss_color, print_json, progress, results
from jaxq.comparison import (
    HEADER,
    LEFT_ALIGNED,
    Comparison,
    Step,
    cells,
    legend,
    needs_data,
    title,
)
from jaxq.comparison import compare as run_compare
from jaxq.lm import load_lm
from jaxq.model import CALIBRATION_SEQUENCES
from jaxq.recipe import Recipe
from jaxq.report import write_comparison

WIDE = 94  # columns of a terminal that has room for every column of the table
SIZE = HEADER.index("size")


@guarded
def compare(  # noqa: PLR0913  one argument per option
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(
            "--recipes",
            "-r",
            metavar="A,B,C",
            help="Names of recipes (see [bold]jaxq plan --help[/]) or their YAML or "
            "JSON files, with commas between.",
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXTFILE", help="The text to predict, in UTF-8; or [bold]demo[/]."
        ),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTFILE",
            help="A text to calibrate on, if a recipe needs one; or [bold]demo[/].",
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N|A,B,C", help="So many draws of calibration data, or their seeds."
        ),
    ] = "3",
    group_size: GroupSize = None,
    sequences: Annotated[
        int, typer.Option(min=1, help="Windows in a draw.")
    ] = CALIBRATION_SEQUENCES,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in each; default: 512, or the context."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens evaluated at once; default: context, ≤ 2048."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many windows; default: all.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder to write; default: compare-MODEL, or none with --json.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare recipes: same model, text, calibration data and seeds for all.

    A recipe that needs data runs once per seed, each on another draw of windows at
    random offsets, so that the spread says which differences are noise; others run
    once. Prints a table and writes compare.md, compare.json and compare.svg.

    [bold]KL[/] is KL(float ‖ quantized) per token in nats, the least noisy figure;
    [bold]vs best[/] holds it against the best recipe that is not larger.

    [bold]Examples[/]
      jaxq compare demo --recipes w4a16,nf4,mxfp4 --text demo --limit 24
      jaxq compare ./llama -r w4a16,mine.yaml --text wiki.txt --calibration c4.txt
      jaxq compare demo -r w4a16,w3a16 --text demo --group-size 32 --json

    Exits with 3 when weights fell back to rounding: the table says which.
    """
    chosen = [read_recipe(name, "--recipes") for name in split_names(recipes)]
    drawn = read_seeds(seeds)
    content = read_text(text, "eval.txt")
    data = None if calibration is None else read_text(calibration, "calibration.txt")
    hungry = [recipe.name for recipe in chosen if needs_data(recipe)]
    if hungry and data is None:
        raise typer.BadParameter(
            f"{' and '.join(hungry)} must see data: add --calibration TEXTFILE, "
            f"another text than --text",
            param_hint="--calibration",
        )
    folder = None if as_json and output is None else Path(output or _folder(model))
    _refuse_file(folder)
    with errors().status(f"loading {model}"):
        lm = load_lm(model)
    with _watched(chosen) as watch:
        found = run_compare(
            lm,
            chosen,
            content,
            data,
            seeds=drawn,
            group_size=group_size,
            sequences=sequences,
            length=length,
            window=window,
            limit=limit,
            progress=watch,
        )
    written = [] if folder is None else write_comparison(found, folder)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found, folder, written)
    if any(row.fallbacks for row in found.rows):
        raise typer.Exit(FELL_BACK)


def _show(found: Comparison, folder: Path | None, written: Sequence[Path]) -> None:
    """Print the table, what it says, and which files were written."""
    console = results()
    console.print(table(found, wide=console.width >= WIDE))
    console.print()
    for line in legend(found):
        style = "yellow" if line.startswith("!") else "dim"
        console.print(Text(line, style=style))
    names = ", ".join(path.name for path in written)
    errors().print(f"\n[dim]written:[/] {folder}: {names}", highlight=False)


def split_names(recipes: str) -> list[str]:
    """Return the names in a list with commas.

    Raises:
        typer.BadParameter: when there is none.
    """
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(
            "there is no name in it; write for example w4a16,nf4",
            param_hint="--recipes",
        )
    return names


def read_seeds(seeds: str) -> tuple[int, ...]:
    """Return the seeds that ``3``, ``0,1,2`` or ``7,`` (one, the seed 7) stands for.

    Raises:
        typer.BadParameter: on anything else.
    """
    parts = [part.strip() for part in seeds.split(",")]
    given = [part for part in parts if part]
    if not given or not all(part.isdecimal() for part in given):
        raise typer.BadParameter(
            f"{seeds!r} is neither a number of draws nor seeds: write 3, or 0,1,2",
            param_hint="--seeds",
        )
    if len(parts) > 1:
        return tuple(map(int, given))
    if int(seeds) < 1:
        raise typer.BadParameter("0 draws measure nothing; write 1 or more",
                                 param_hint="--seeds")  # fmt: skip
    return tuple(range(int(seeds)))


def table(found: Comparison, *, wide: bool) -> Table:
    """Return the comparison as a table for terminals; narrow ones do without bytes."""
    out = Table(
        title=title(found),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown = [i for i in range(len(HEADER)) if wide or i != SIZE]
    for i in shown:
        name = HEADER[i]
        out.add_column(
            name,
            justify="left" if name in LEFT_ALIGNED else "right",
            style="bold" if i == 0 else None,
            overflow="fold",
            no_wrap=i > 0,
        )
    whole, *rows = cells(found)
    out.add_row(*(whole[i] for i in shown), style="dim")
    for row, verdict, words in zip(found.rows, found.verdicts, rows, strict=True):
        kl = row["kl"].mean
        styles = {
            "KL": loss_color(kl),
            "vs best": "bold green" if verdict.best else "dim" if verdict.noise else "",
        }
        out.add_row(*(_styled(words[i], styles.get(HEADER[i], "")) for i in shown))
    return out


def _styled(words: str, style: str) -> Text:
    """Return a cell whose spread is set back."""
    value, sign, spread = words.rstrip().partition(" ±")
    return Text.assemble((value, style), (sign + spread, "dim"))


@contextmanager
def _watched(recipes: Sequence[Recipe]) -> Iterator[Callable[[Step], None]]:
    """Show a bar on stderr, and a line for every run that is done."""
    width = max(len(recipe.name) for recipe in recipes)
    with progress() as bars:
        task = bars.add_task("comparing", total=None)

        def watch(step: Step) -> None:
            seed = "" if step.seed is None else f" seed {step.seed}"
            said = f"{step.recipe}{seed}: {step.what}"
            bars.update(task, completed=step.done, total=step.total, description=said)
            run = step.run
            if run is not None:
                kl = "" if step.recipe == "float" else f"  KL {run.kl:.5f}"
                bars.console.print(
                    f"[dim]{step.recipe:<{width}}{seed:<8}  perplexity "
                    f"{run.perplexity:.3f}{kl}[/]",
                    highlight=False,
                )

        yield watch


def _folder(model: str) -> str:
    """Return the folder to write when none is named."""
    return f"compare-{Path(model).resolve().name}"


def _refuse_file(folder: Path | None) -> None:
    """Raise, before the work, when the folder could not be made."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder with --output")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{folder.parent} is no folder: name one in a folder that exists"
        )
