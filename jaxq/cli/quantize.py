"""`jaxq quantize`: a float model in, a smaller one out."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import typer
from rich.table import Table

from jaxq.cli.evidence import listed
from jaxq.cli.failures import FELL_BACK, guarded
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
from jaxq.convert import TARGETS
from jaxq.convertible import JAXQ
from jaxq.lm import load_model
from jaxq.model import Model as AnyModel
from jaxq.recipe import Recipe
from jaxq.report import Evidence, read_evidence
from jaxq.streaming import quantize_to

SHOWN = 5
SAFETENSORS, ORBAX = BACKENDS = ("safetensors", "orbax")


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
        str,
        typer.Option(
            metavar="FORMAT",
            help="safetensors or orbax, or what [bold]jaxq convert --to[/] takes.",
        ),
    ] = "safetensors",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace a checkpoint that is there, and what a killed run left.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where a killed or interrupted run stopped."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it.

    The folder appears complete or not at all, and loads with [bold]jaxq.load_model[/]
    and every command here. The model is read, solved and written block by block, so it
    may be larger than memory; a run that was killed goes on with [bold]--resume[/], and
    ends with the same bytes. Other engines' formats are made in the end of what was
    solved, which is on the disk till then; what they cannot express is refused before.
    Where calibration could not help a weight it is rounded to nearest, which is said,
    and the exit code is then 3.

    [bold]Examples[/]
      jaxq quantize demo -o small --recipe w4a16
      jaxq quantize ./llama -o llama-nf4 --recipe nf4 --group-size 128
      jaxq quantize ./llama -o out --recipe w4a16-gptq --calibration notes.txt
      jaxq quantize ./llama -o out --recipe w4a16-gptq --calibration notes.txt --resume
      jaxq quantize ./llama -o llama-bnb --recipe nf4 --to bitsandbytes
    """
    chosen = read_recipe(recipe)
    if to not in BACKENDS and to not in TARGETS:
        raise typer.BadParameter(
            f"no format {to!r}; known are {', '.join((*BACKENDS, *TARGETS))}",
            param_hint="--to",
        )
    text = None if calibration is None else read_text(calibration, "calibration.txt")
    if resume and to == ORBAX:
        raise typer.BadParameter(
            f"a run to {to} is written at once and cannot be resumed; use "
            f"--to safetensors",
            param_hint="--resume",
        )
    start = time.perf_counter()
    with errors().status(f"loading {model}"):
        lm = load_model(model, lazy=to != ORBAX)
    work = Work(output, chosen, text, group_size, to, force, resume)
    done = whole(lm, work) if to == ORBAX else stream(lm, work)
    report(model, to, done, time.perf_counter() - start, as_json)
    if done.evidence.fallbacks:
        raise typer.Exit(FELL_BACK)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done."""

    output: str
    recipe: Recipe
    calibration: str | None
    group_size: int | None
    to: str
    force: bool
    resume: bool


@dataclasses.dataclass(frozen=True)
class Done:
    """What was done.

    Attributes:
        path: the folder.
        recipe: the recipe, with the group size that was asked for.
        before: bytes and bits per weight of the float model.
        after: the same of the quantized one.
        evidence: of every quantized weight, by path, as plain data.
        resumed: how many blocks an earlier run had finished.
    """

    path: str
    recipe: str
    before: tuple[int, float]
    after: tuple[int, float]
    evidence: Evidence
    resumed: int = 0


def stream(lm: AnyModel, work: Work) -> Done:
    """Quantize block by block, each written as it is done."""
    with progress() as bars:
        task = bars.add_task(f"quantizing to {work.recipe.name}", total=None)

        def tell_progress(_: object, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)
            if done == total:
                bars.update(task, description=f"writing {work.output}")

        written = quantize_to(
            lm,
            work.output,
            work.recipe,
            work.calibration,
            work.group_size,
            to=JAXQ if work.to == SAFETENSORS else work.to,
            resume=work.resume,
            overwrite=work.force,
            progress=tell_progress,
        )
    if written.conversion is not None:
        told = str(written.conversion)
        errors().print(told, markup=False, highlight=False, soft_wrap=True)
    return Done(
        str(written.path),
        written.recipe.name,
        (lm.nbytes, lm.bits_per_weight),
        (written.bytes, written.bits_per_weight),
        read_evidence({"evidence": written.evidence}),
        written.resumed,
    )


def whole(lm: AnyModel, work: Work) -> Done:
    """Quantize in memory, and write all of it at the end."""
    small = run_quantize(lm, work.recipe, work.calibration, work.group_size)
    with errors().status(f"writing {work.output}"):
        folder = small.save(work.output, backend=work.to, overwrite=work.force)
    return Done(
        str(folder),
        small.recipe.name if small.recipe else work.recipe.name,
        (lm.nbytes, lm.bits_per_weight),
        (small.nbytes, small.bits_per_weight),
        read_evidence({"evidence": small.evidence}),
    )


def report(model: str, to: str, done: Done, seconds: float, as_json: bool) -> None:
    """Print what was done."""
    before, after = done.before[0], done.after[0]
    facts = {
        "model": model,
        "recipe": done.recipe,
        "output": done.path,
        "format": to,
        "bits_per_weight": done.after[1],
        "bytes": after,
        "bytes_before": before,
        "seconds": round(seconds, 3),
        "resumed_blocks": done.resumed,
        "fallbacks": {
            tensor.path: tensor.fallback
            for tensor in done.evidence.tensors
            if tensor.fallback
        },
        "notes": done.evidence.notes,
    }
    if as_json:
        print_json(facts)
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        ratio = before / after
        rows = [
            ("recipe", done.recipe),
            ("bits per weight", f"{done.before[1]:.3f} → {done.after[1]:.3f}"),
            ("size", f"{size(before)} → {size(after)} ({ratio:.2f}× smaller)"),
            ("seconds", f"{seconds:.1f}"),
            ("written", f"{done.path} ({to})"),
        ]
        if done.resumed:
            rows.insert(1, ("resumed", f"after {done.resumed} finished blocks"))
        for name, value in rows:
            table.add_row(f"[dim]{name}[/]", value)
        results().print(table)
    tell(done.evidence)
    hint = f"jaxq eval {done.path} --text TEXTFILE --reference {model}"
    if not as_json:
        errors().print(f"[dim]next:[/] {hint}", highlight=False)


def tell(evidence: Evidence) -> None:
    """Say which weights are not what the recipe asked for, and what else to know."""
    count = sum(map(len, evidence.fallbacks.values()))
    if count:
        errors().print(
            f"[bold yellow]fell back:[/] {count} weights (exit code {FELL_BACK})"
        )
        _list(evidence.fallbacks)
    if evidence.notes:
        errors().print("[bold yellow]to know:[/]")
        _list(evidence.notes)


def _list(reasons: Mapping[str, Sequence[str]]) -> None:
    """Print what is said of weights, and of which, the first few of each."""
    console = errors()
    for reason, paths in list(reasons.items())[:SHOWN]:
        console.print(
            f"  {listed(paths)}: {reason}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if len(reasons) > SHOWN:
        console.print("  and more: jaxq inspect --evidence", highlight=False)


def run_quantize(
    lm: AnyModel, recipe: Recipe, calibration: str | None, group_size: int | None
) -> AnyModel:
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
