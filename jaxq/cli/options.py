"""Arguments and options that several commands share, and what their values mean."""

from pathlib import Path
from typing import Annotated

import typer

from jaxq.kvcache import CACHES
from jaxq.lm import DEMO, DEMO_FOLDER
from jaxq.names import lookup
from jaxq.presets import PRESETS
from jaxq.recipe import Recipe

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or [bold]demo[/].")
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help=f"One of {', '.join(PRESETS)}; or a recipe's YAML or JSON file.",
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(min=1, help="Weights that share a scale; default: the recipe's own."),
]


def known_cache(name: str) -> str:
    """Return the name of a cache, if it is one.

    Raises:
        typer.BadParameter: with the names that there are.
    """
    try:
        lookup(CACHES, name, "cache")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cache") from error
    return name


CacheName = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="NAME",
        callback=known_cache,
        help=f"What keys and values are kept as: {', '.join(CACHES)}.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def read_recipe(name: str, option: str = "--recipe") -> Recipe:
    """Return the preset of that name, or the recipe in that file.

    Args:
        name: the preset or the file.
        option: where it was given, for the message.

    Raises:
        typer.BadParameter: when there is neither, or the file holds no recipe.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    try:
        if path.is_file():
            return Recipe.load(path)
        if path.suffix in (".yaml", ".yml", ".json") or "/" in name:
            raise ValueError(f"there is no file {name}")
        lookup(PRESETS, name, "recipe")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    raise AssertionError("lookup raises for a name that is no preset")


def read_text(path: str, demo_file: str) -> str:
    """Return the text of a file; the word ``demo`` is a text that comes with jaxq.

    Args:
        path: the file, or ``demo``.
        demo_file: the file in the demo model's folder that ``demo`` stands for.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not UTF-8.
    """
    file = DEMO_FOLDER / demo_file if path == DEMO else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is no file: name a text file in UTF-8, or write '{DEMO}' for the "
            f"text that comes with jaxq"
        )
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no UTF-8 text (at byte {error.start:,}): convert it, for "
            f"instance with iconv"
        ) from error
