"""`jaxq quantize`: a float model in, a smaller one out."""

import time
from typing import Annotated

import jax
import typer
from rich.table import Table

from jaxq.cli.failures import guarded
from jaxq.cli.options import (
    Debug,
    GroupSize,
    Json,
    Model,
    RecipeName,
    read_recipe,
    read_text,
)
from jaxq.cli.screen import errors, print_json, progress, results, size
from jaxq.lm import LM, load_model
from jaxq.recipe import Recipe

BACKENDS = ("safetensors", "orbax")


@guarded
def quantize(  # noqa: PLR0913  one argument per option
    model: Model,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="OUT", help="The folder to write."),
    ],
    recipe: RecipeName,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTFILE",
            help="A text to calibrate on, if the recipe needs one; or [bold]demo[/].",
        ),
    ] = None,
    group_size: GroupSize = None,
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="safetensors or orbax.")
    ] = "safetensors",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it.

    The folder is written completely or not at all, and loads with
    [bold]jaxq.load_model[/] and every command here.

    [bold]Examples[/]
      jaxq quantize demo -o small --recipe w4a16
      jaxq quantize ./llama -o llama-nf4 --recipe nf4 --group-size 128
      jaxq quantize ./llama -o out --recipe mine.yaml --calibration notes.txt --json
    """
    chosen = read_recipe(recipe)
    if to not in BACKENDS:
        raise typer.BadParameter(
            f"writing {to!r} is not there yet; there is {' and '.join(BACKENDS)}",
            param_hint="--to",
        )
    text = None if calibration is None else read_text(calibration, "calibration.txt")
    start = time.perf_counter()
    with errors().status(f"loading {model}"):
        lm = load_model(model)
    small = run_quantize(lm, chosen, text, group_size)
    with errors().status(f"writing {output}"):
        folder = small.save(output, backend=to, overwrite=force)
    facts = {
        "model": model,
        "recipe": small.recipe.name if small.recipe else chosen.name,
        "output": str(folder),
        "format": to,
        "bits_per_weight": small.bits_per_weight,
        "bytes": small.nbytes,
        "bytes_before": lm.nbytes,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    ratio = lm.nbytes / small.nbytes
    for name, value in (
        ("recipe", facts["recipe"]),
        ("bits per weight", f"{lm.bits_per_weight:.3f} → {small.bits_per_weight:.3f}"),
        ("size", f"{size(lm.nbytes)} → {size(small.nbytes)} ({ratio:.2f}× smaller)"),
        ("seconds", f"{facts['seconds']:.1f}"),
        ("written", f"{folder} ({to})"),
    ):
        table.add_row(f"[dim]{name}[/]", value)
    results().print(table)
    hint = f"jaxq eval {output} --text TEXTFILE --reference {model}"
    errors().print(f"[dim]next:[/] {hint}", highlight=False)


def run_quantize(
    lm: LM, recipe: Recipe, calibration: str | None, group_size: int | None
) -> LM:
    """Quantize behind a progress bar."""
    with progress() as bars:
        task = bars.add_task(f"quantizing to {recipe.name}", total=None)
        small = lm.quantize(
            recipe,
            calibration,
            group_size,
            progress=lambda _, done, total: bars.update(
                task, completed=done, total=total
            ),
        )
        jax.block_until_ready(small.params)
    return small
