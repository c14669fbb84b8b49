"""`jaxq convert`: a model from one format into another."""

import dataclasses
from typing import Annotated

import typer

from jaxq.cli.failures import guarded
from jaxq.cli.options import Debug, Json
from jaxq.cli.screen import errors, print_json, results
from jaxq.convert import TARGETS
from jaxq.convert import convert as run


@guarded
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A model's folder, or a GGUF file.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help=f"{', '.join(TARGETS)}.")
    ] = "jaxq",
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Round weights anew (to nearest) where FORMAT cannot express them.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model's folder that is there.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model in the format of another library.

    Quantized weights keep their codes and scales. What the format cannot express is
    refused with the reason, or rounded anew with [bold]--requantize[/]; every weight
    that is not what it was is listed. The folder appears complete or not at all; a
    killed run leaves a hidden [bold].OUT.*.partial[/], which may be removed. A float
    model is quantized first: [bold]jaxq quantize --to[/].

    [bold]Examples[/]
      jaxq convert ./llama-gptq ours
      jaxq convert ./llama-awq ./llama-ct --to compressed-tensors
      jaxq convert model.gguf ./llama-gptq --to gptq --requantize
    """
    if to not in TARGETS:
        raise typer.BadParameter(
            f"no format {to!r}; known are {', '.join(TARGETS)}", param_hint="--to"
        )
    with errors().status(f"converting {source}"):
        done = run(source, output, to, requantize=requantize, overwrite=force)
    if as_json:
        print_json(
            {
                "output": str(done.path),
                "source": done.source,
                "format": done.target,
                "lossless": done.lossless,
                "counts": done.counts(),
                "rows": [dataclasses.asdict(row) for row in done.rows],
                "notes": dict(done.notes),
            }
        )
        return
    results().print(str(done), markup=False, highlight=False, soft_wrap=True)
    lost = [row for row in done.rows if row.error]
    if lost:
        worst = max(lost, key=lambda row: row.error)
        errors().print(
            f"requantized {len(lost)} weights; the largest relative error is "
            f"{worst.error:.4f}, of {worst.name}",
            markup=False,
            highlight=False,
        )
