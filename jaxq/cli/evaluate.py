"""`jaxq eval`: what a model makes of a text, and how far it is from the float one."""

from typing import Annotated

import typer
from rich.table import Table

from jaxq.cli.failures import guarded
from jaxq.cli.options import CacheName, Debug, Json, Model, read_text
from jaxq.cli.screen import errors, print_json, progress, results, size
from jaxq.evaluate import Evaluation, evaluate_text
from jaxq.kvcache import FLOAT
from jaxq.lm import LM, load_lm


@guarded
def evaluate(  # noqa: PLR0913  one argument per option
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXTFILE", help="The text to predict, in UTF-8; or [bold]demo[/]."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The float model to compare with."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window; default: the context, ≤ 2048."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many windows; default: all.")
    ] = None,
    cache: CacheName = FLOAT,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity; with a reference also divergence and agreement.

    The text is one stream of tokens, cut into windows that do not overlap; in each,
    every token but the first is predicted. Perplexity is exp of the mean negative log
    likelihood (float32). [bold]kl[/] is KL(reference ‖ model) per token in nats,
    [bold]top1[/] the share of tokens where both find the same likeliest.

    [bold]Examples[/]
      jaxq eval demo --text demo
      jaxq eval small --text demo --reference demo
      jaxq eval demo --text demo --reference demo --cache int4
      jaxq eval small --text wiki.txt --window 1024 --json

    [bold]JSON[/]
      perplexity, kl, top1 (null without a reference), tokens, bits_per_weight, ...
    """
    content = read_text(text, "eval.txt")
    with errors().status("loading"):
        lm = load_lm(model)
        lm = lm if cache == FLOAT else lm.with_cache(cache)
        other = None if reference is None else load_lm(reference)
    with progress() as bars:
        task = bars.add_task("evaluating", total=None)
        found = evaluate_text(
            lm,
            content,
            other,
            window=window,
            limit=limit,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(_facts(lm, found))
    else:
        results().print(_table(lm, found))


def _facts(lm: LM, found: Evaluation) -> dict[str, object]:
    return {
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "tokens": found.tokens,
        "bits_per_weight": lm.bits_per_weight,
        "nll": found.nll,
        "bytes": lm.nbytes,
        "seconds": round(found.seconds, 3),
    }


def _table(lm: LM, found: Evaluation) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("perplexity", f"[bold]{found.perplexity:.4f}[/]"),
        ("tokens", f"{found.tokens:,}"),
        ("bits per weight", f"{lm.bits_per_weight:.3f}"),
        ("size", size(lm.nbytes)),
        ("seconds", f"{found.seconds:.1f}"),
    ]
    if found.kl is not None and found.top1 is not None:
        rows[1:1] = [
            ("KL to reference", f"{found.kl:.6f} nats per token"),
            ("top-1 agreement", f"{found.top1:.2%}"),
        ]
    for name, value in rows:
        table.add_row(f"[dim]{name}[/]", value)
    return table
