"""The commands, and what `jaxq --help` says."""

import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Annotated

import typer

from jaxq.cli.compare import compare
from jaxq.cli.convert import convert
from jaxq.cli.demo import demo
from jaxq.cli.evaluate import evaluate
from jaxq.cli.generate import generate
from jaxq.cli.inspect import inspect as show
from jaxq.cli.plan import plan
from jaxq.cli.quantize import quantize

HELP = """
Quantize language models, and see what it cost.

A MODEL is a folder: a Hugging Face one (config.json, safetensors, tokenizer.json), one
that jaxq wrote, or the word [bold]demo[/] for the small model that comes with jaxq.

[bold]Start here[/]
  jaxq demo                                      a table and a report
  jaxq plan demo --recipe w4a16                  what would be done
  jaxq quantize demo -o small --recipe w4a16     do it
  jaxq eval small --text demo --reference demo   what it cost
  jaxq generate small --prompt "import "         use it
  jaxq compare demo -r w4a16,nf4 --text demo     which recipe to choose
  jaxq convert ./llama-gptq ours                 from and to other libraries

[bold]Exit codes[/]
  0    done
  1    failed: the message says what, and what to do about it
  2    the command line itself was wrong: an unknown option, recipe or format
  3    done, but some weights fell back to rounding; which and why is said
  130  interrupted (Ctrl-C); nothing half-written is left under the name asked for
"""


def _keep_lines(text: str) -> str:
    """Join the lines of paragraphs, but for those under a bold title of their own."""
    out = []
    for paragraph in text.strip().split("\n\n"):
        titled = re.match(r"\[bold\][^\n]*\[/\]\n", paragraph)
        out.append(f"\b\n{paragraph}" if titled else paragraph.replace("\n", " "))
    return "\n\n".join(out)


app = typer.Typer(
    help=_keep_lines(HELP),
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"jaxq {importlib.metadata.version('jaxq')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("jaxq, not installed: run from its source")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Stand before every command."""


def _add(name: str, command: Callable[..., None], *, bare: bool = False) -> None:
    """Add a command whose docstring is its help; `bare`: it runs without arguments."""
    text = _keep_lines(inspect.cleandoc(command.__doc__ or ""))
    app.command(name, help=text, no_args_is_help=not bare)(command)


_add("demo", demo, bare=True)
_add("quantize", quantize)
_add("eval", evaluate)
_add("generate", generate)
_add("plan", plan)
_add("inspect", show)
_add("compare", compare)
_add("convert", convert)


def main() -> None:
    """Run the command line; the entry point of the `jaxq` script."""
    app()
