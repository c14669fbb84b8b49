"""`jaxq generate`: text from a model, as it is made."""

from typing import Annotated

import typer

from jaxq.cli.failures import guarded
from jaxq.cli.options import CacheName, Debug, Model
from jaxq.cli.screen import errors, results
from jaxq.kvcache import FLOAT
from jaxq.lm import load_lm


@guarded
def generate(  # noqa: PLR0913  one argument per option
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue.")
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among the k likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among tokens that reach this in sum.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same text.")] = 0,
    cache: CacheName = FLOAT,
    debug: Debug = False,
) -> None:
    """Continue a text.

    The prompt and its continuation go to stdout, piece by piece.

    [bold]Examples[/]
      jaxq generate demo --prompt "import "
      jaxq generate small -p "The module" -n 128 --temperature 0.8 --top-p 0.95
      jaxq generate small -p "The module" --cache int8
    """
    with errors().status("loading"):
        lm = load_lm(model)
    pieces = lm.stream(
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cache=cache,
    )
    with errors().status("compiling"):
        first = next(pieces, "")
    console = results()
    console.print(prompt, end="", style="bold", markup=False, soft_wrap=True)
    for piece in (first, *()):
        console.out(piece, end="", highlight=False)
    for piece in pieces:
        console.out(piece, end="", highlight=False)
        console.file.flush()
    console.out("")
