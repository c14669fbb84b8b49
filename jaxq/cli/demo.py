"""`jaxq demo`: several recipes on the embedded model, a live table and a report."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxq.cli.board import Board
from jaxq.cli.failures import guarded
from jaxq.cli.options import Debug, Json, read_text
from jaxq.cli.screen import errors, print_json, results
from jaxq.comparison import needs_data
from jaxq.evaluate import evaluate, logits_of, parameter_count, text_windows
from jaxq.lm import DEMO, LM, load_model
from jaxq.presets import as_recipe
from jaxq.report import (
    Evidence,
    MatrixError,
    Report,
    Result,
    capture_activations,
    channels_of,
    distribution_of,
    group_by_kind,
    matrix_errors,
    read_evidence,
    write_report,
)

RECIPES = (
    "w8a16",
    "w8a8",
    "nf4",
    "w4a16",
    "mxfp4",
    "w3a16",
    "w3a16-gptq",
    "w2a16",
    "w2a16-gptq",
)
QUICK_RECIPES = ("w8a16", "nf4", "w4a16", "w2a16")
WINDOWS, QUICK_WINDOWS = 24, 6
BATCH = 2  # several batches, so that the first, which compiles, need not be timed
SAMPLE_RECIPE = "w4a16"
PROMPT = "The :mod:`"
SAMPLE_TOKENS = 48


@guarded
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer recipes, less text: about a minute.")
    ] = False,
    report: Annotated[
        str, typer.Option(metavar="FILE", help="Where the report goes.")
    ] = "report.html",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize the embedded model with several recipes and show what each one costs.

    A small Llama, trained on Python's documentation, comes with jaxq. This measures
    bits per weight, perplexity, KL divergence and agreement on text it never saw;
    writes report.html with charts; and lets the 4-bit model write a line.

    [bold]Examples[/]
      jaxq demo
      jaxq demo --quick --report /tmp/quick.html
    """
    names, count = (QUICK_RECIPES, QUICK_WINDOWS) if quick else (RECIPES, WINDOWS)
    if not Path(report).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{Path(report).parent} is no folder: name a report in one that exists"
        )
    with errors().status("loading the demo model"):
        lm = load_model(DEMO)
        windows = text_windows(lm, read_text(DEMO, "eval.txt"), limit=count)
    board = Board(_title(lm, windows), ("float", *names))
    with board.shown(errors() if as_json else results()):
        study = _study(lm, windows, board)
        for name in names:
            _try_recipe(study, name, board)
        board.begin("float", "writing a line of text", 1.0)
        sample = study.kept[SAMPLE_RECIPE].generate(PROMPT, SAMPLE_TOKENS)
        written = write_report(_report(study, sample), report)
        board.finish()
    if as_json:
        print_json([dataclasses.asdict(result) for result in study.results])
    else:
        _say_what_next(written, sample)


@dataclasses.dataclass
class Study:
    """What is known so far.

    Attributes:
        lm: the float model.
        windows: the evaluation text.
        reference: the float model's logits, batch by batch.
        activations: inputs of its products.
        results: of the recipes measured, the float model first.
        matrices: errors per matrix.
        kept: quantized models that are needed later.
        evidence: of recipes that saw data, by name.
    """

    lm: LM
    windows: np.ndarray
    reference: list[jax.Array]
    activations: dict[str, jax.Array]
    results: list[Result]
    matrices: list[MatrixError]
    kept: dict[str, LM]
    evidence: dict[str, Evidence]


def _study(lm: LM, windows: np.ndarray, board: Board) -> Study:
    """Measure the float model."""
    board.begin("float", "evaluating", 1.0)
    reference = list(logits_of(lm.apply, lm.params, windows, batch=BATCH))
    board.share(0.5)
    found = evaluate(lm.apply, lm.params, windows, reference, batch=BATCH)
    result = Result(
        "float",
        lm.bits_per_weight,
        lm.nbytes,
        found.perplexity,
        tokens_per_second=found.tokens_per_second,
    )
    board.end(result)
    board.begin("float", "watching activations", 0.5)
    tokens = jnp.asarray(windows[:2])
    activations = capture_activations(lm.forward, lm.params, tokens)
    return Study(lm, windows, reference, activations, [result], [], {}, {})


def _try_recipe(study: Study, name: str, board: Board) -> None:
    """Quantize with one recipe, and measure what it cost."""
    lm = study.lm
    board.begin(name, "quantizing", 1.0)
    start = time.perf_counter()
    data = read_text(DEMO, "calibration.txt") if needs_data(as_recipe(name)) else None
    small = lm.quantize(
        name, data, progress=lambda _, done, total: board.share(done / total)
    )
    jax.block_until_ready(small.params)
    seconds = time.perf_counter() - start
    board.begin(name, "evaluating", 2.0)
    found = evaluate(
        small.apply,
        small.params,
        study.windows,
        study.reference,
        batch=BATCH,
        progress=lambda done, total: board.share(done / total),
    )
    board.begin(name, "measuring layers", 0.5)
    study.matrices += matrix_errors(
        name, lm.forward, lm.params, small.params, study.activations
    )
    rules = small.recipe.rules if small.recipe else ()
    result = Result(
        name,
        small.bits_per_weight,
        small.nbytes,
        found.perplexity,
        found.kl or 0.0,
        found.top1 or 0.0,
        seconds,
        found.tokens_per_second,
        any(rule.activation is not None for rule in rules),
    )
    study.results.append(result)
    board.end(result)
    proof = read_evidence(small.metadata())
    if proof:
        study.evidence[name] = proof
    if name == SAMPLE_RECIPE:
        study.kept[name] = small


def _report(study: Study, sample: str) -> Report:
    """Put the report together."""
    lm, inputs = study.lm, group_by_kind(study.activations)
    flat, _ = jax.tree_util.tree_flatten_with_path(lm.params)
    matrices = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
        if leaf.ndim > 1
    }
    weights = [distribution_of(k, a) for k, a in group_by_kind(matrices).items()]
    # Query, key and value read the same input, as do gate and up: one of each will do.
    skipped = ("k_proj", "v_proj", "up_proj")
    shown = {k: a for k, a in inputs.items() if not k.endswith(skipped)}
    activations = [distribution_of(f"input of {k}", a) for k, a in shown.items()]
    channels = [
        channels_of(f"input of {worst.removeprefix('params/')}", arrays[worst])
        for arrays in shown.values()
        for worst in [max(arrays, key=lambda p: _peak(arrays[p]))]
    ]
    return Report(
        "the demo model",
        (
            ("parameters", f"{parameter_count(lm.params) / 1e6:.1f} million"),
            ("tokens of held-out text", f"{study.windows.size:,}"),
            (f"on {jax.default_backend()}", f"jax {jax.__version__}"),
        ),
        tuple(study.results),
        tuple(study.matrices),
        tuple(weights),
        tuple(activations),
        tuple(sorted(channels, key=lambda c: -_peak(c.largest))[:4]),
        PROMPT,
        sample,
        SAMPLE_RECIPE,
        tuple(study.evidence.items()),
    )


def _peak(values: np.ndarray) -> float:
    """Return how far the largest value stands out from the typical one."""
    sizes = np.abs(values)
    return float(sizes.max() / (np.median(sizes) or 1.0))


def _title(lm: LM, windows: np.ndarray) -> str:
    return (
        f"the demo model: {parameter_count(lm.params) / 1e6:.1f} M parameters, "
        f"{windows.size:,} tokens of held-out text"
    )


def _say_what_next(report: Path, sample: str) -> None:
    console = results()
    console.print(f"\n[bold]{SAMPLE_RECIPE} writes[/]", highlight=False)
    console.print(f"  [cyan]{PROMPT}[/]", end="", highlight=False)
    console.print(sample.replace("\n", "\n  "), markup=False, highlight=False)
    console.print(f"\n[bold]report[/]  {report}", highlight=False, soft_wrap=True)
    console.print(
        "\n[bold]next[/]\n"
        "  jaxq quantize demo -o small --recipe w4a16\n"
        "  jaxq eval small --text demo --reference demo\n"
        '  jaxq generate small --prompt "import "\n'
        "  jaxq plan FOLDER --recipe nf4        [dim]for a model of your own[/]",
        highlight=False,
    )
