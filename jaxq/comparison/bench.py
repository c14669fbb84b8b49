"""`compare`: quantize with every recipe and seed, and measure each result alike."""

import dataclasses
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from jaxq.comparison.content import Calibration, Comparison, Row, Run, Text
from jaxq.evaluate import (
    LONGEST_WINDOW,
    batch_size,
    draw_windows,
    evaluate,
    logits_of,
    parameter_count,
    text_windows,
)
from jaxq.lm import LM
from jaxq.model import CALIBRATION_SEQUENCES, CALIBRATION_TOKENS
from jaxq.presets import as_recipe
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec

SEEDS = (0, 1, 2)
REFERENCE_BYTES = 2**30  # the float model's logits are kept if they are no more


@dataclasses.dataclass(frozen=True)
class Step:
    """What is being done.

    Attributes:
        recipe: its name; ``float`` for the model itself.
        seed: of the calibration data, or None.
        what: ``quantizing``, ``evaluating`` or ``done``.
        done: runs that are done, the present one in parts.
        total: runs there are, the float model's included.
        run: its result, once it is done.
    """

    recipe: str
    seed: int | None
    what: str
    done: float
    total: int
    run: Run | None = None


Progress = Callable[[Step], None]


def compare(  # noqa: PLR0913  a benchmark, and everything that defines it
    lm: LM,
    recipes: Sequence[str | Recipe | QuantSpec],
    text: str,
    calibration: str | Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    group_size: int | None = None,
    sequences: int = CALIBRATION_SEQUENCES,
    length: int | None = None,
    window: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure what several recipes make of one model, alike and repeatedly.

    Every recipe sees the same model, text and windows; those that need data also the
    same draws of calibration data, one run per seed, so that a difference can be told
    from luck. Recipes that need none run once. The headline is the mean over tokens of
    ``KL(float ‖ quantized) = Σ p log(p / q)``: it is less noisy than perplexity, which
    can improve by accident.

    Args:
        lm: the float model.
        recipes: names of presets, `Recipe`s or `QuantSpec`s; the names must differ.
        text: what is predicted; see `jaxq.perplexity` for the protocol.
        calibration: the text, or texts, that calibration data is drawn from.
        seeds: of the draws.
        group_size: replaces the group size of recipes that have groups.
        sequences: windows in a draw.
        length: tokens in each; None is 512, or the context where that is shorter.
        window: tokens per window of the evaluation; None is the context, at most 2048.
        limit: at most so many windows of the evaluation; None takes all.
        progress: called as work proceeds, with the result of every run.

    Raises:
        ValueError: on an unknown preset, two recipes of one name, a recipe that needs
            data without any, a text shorter than a window, bad seeds, or a recipe that
            does not suit the model; all before the first run.

    Example:
        >>> import jaxq
        >>> lm = jaxq.load_model("demo")  # doctest: +SKIP
        >>> text = open("text.txt").read()  # doctest: +SKIP
        >>> print(jaxq.compare(lm, ["w4a16", "nf4"], text))  # doctest: +SKIP
    """
    if lm.is_quantized:
        raise ValueError(
            f"{lm.name} is quantized already: give the float model, which the others "
            f"are measured against"
        )
    chosen = _named_recipes(recipes, group_size)
    windows, facts = _evaluation_data(lm, text, window, limit)
    draws, source = {}, None
    if any(map(needs_data, chosen)):
        draws, source = _draws(lm, chosen, calibration, seeds, sequences, length)
    for recipe in chosen:
        _refuse_unsuited(lm, recipe)
    runs = [(r, seed) for r in chosen for seed in (draws if needs_data(r) else [None])]
    bench = _Bench(lm, windows, len(runs) + 1, progress or (lambda step: None))
    bench.measure(lm, "float", None, 0.0)
    for recipe, seed in runs:
        bench.run(recipe, seed, None if seed is None else draws[seed])
    whole, *rest = bench.found
    by_name = {r.name: [x for n, x in rest if n == r.name] for r in chosen}
    return Comparison(
        lm.name,
        parameter_count(lm.params),
        whole[1],
        tuple(Row(r, tuple(by_name[r.name])) for r in chosen),
        facts,
        source,
        _machine(),
    )


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe needs calibration data."""
    return any(rule.weight is not None and rule.needs_data for rule in recipe.rules)


class _Bench:
    """The float model, its text, and the runs that are done."""

    def __init__(
        self, lm: LM, windows: np.ndarray, total: int, progress: Progress
    ) -> None:
        self.lm, self.windows = lm, windows
        self.total, self.progress = total, progress
        self.found: list[tuple[str, Run]] = []
        vocab = int(lm.config.vocab_size)
        self.batch = batch_size(vocab, windows.shape[1])
        self.kept: list[jax.Array] | None = None
        if 4 * vocab * windows.size <= REFERENCE_BYTES:
            self.kept = list(self._logits())

    def run(self, recipe: Recipe, seed: int | None, data: np.ndarray | None) -> None:
        """Quantize with one recipe on one draw, and measure the result."""

        def say(done: int, total: int) -> None:
            self._say(recipe.name, seed, "quantizing", done / total / 2)

        say(0, 1)
        start = time.perf_counter()
        small = self.lm.quantize(
            recipe, data, progress=lambda _, done, total: say(done, total)
        )
        jax.block_until_ready(small.params)
        self.measure(small, recipe.name, seed, time.perf_counter() - start)

    def measure(self, small: LM, name: str, seed: int | None, seconds: float) -> None:
        """Evaluate a model and note the run."""
        found = evaluate(
            small.apply,
            small.params,
            self.windows,
            self._logits() if self.kept is None else self.kept,
            batch=self.batch,
            progress=lambda done, total: self._say(
                name, seed, "evaluating", 0.5 + done / total / 2
            ),
        )
        run = Run(
            seed,
            small.bits_per_weight,
            small.nbytes,
            found.perplexity,
            found.kl or 0.0,
            1.0 if found.top1 is None else found.top1,
            seconds,
            found.tokens_per_second,
            small.fallbacks,
        )
        self.found.append((name, run))
        self._say(name, seed, "done", 0.0)

    def _logits(self) -> Iterable[jax.Array]:
        lm = self.lm
        return logits_of(lm.apply, lm.params, self.windows, batch=self.batch)

    def _say(self, name: str, seed: int | None, what: str, part: float) -> None:
        run = self.found[-1][1] if what == "done" else None
        done = len(self.found) + part
        self.progress(Step(name, seed, what, done, self.total, run))


def _named_recipes(
    recipes: Sequence[str | Recipe | QuantSpec], group_size: int | None
) -> list[Recipe]:
    """Return the recipes, with their group size replaced where they have groups.

    Raises:
        ValueError: without recipes, on two of one name, or when none has groups.
    """
    if isinstance(recipes, str):
        recipes = [recipes]
    chosen = [as_recipe(cfg) for cfg in recipes]
    if not chosen:
        raise ValueError("there is no recipe to compare: name at least one")
    if group_size is not None:
        grouped = [any(map(_has_groups, recipe.rules)) for recipe in chosen]
        if not any(grouped):
            chosen[0].with_group_size(group_size)  # says why it cannot be
        chosen = [
            recipe.with_group_size(group_size) if has else recipe
            for recipe, has in zip(chosen, grouped, strict=True)
        ]
    names = [recipe.name for recipe in chosen]
    for name in {"float", *names}:
        if names.count(name) > (name != "float"):
            raise ValueError(
                f"{names.count(name)} recipes are called {name!r}, so their rows could "
                f"not be told apart: give each a name of its own (not 'float')"
            )
    return chosen


def _has_groups(rule: Rule) -> bool:
    return rule.weight is not None and isinstance(rule.weight.block, int)


def _evaluation_data(
    lm: LM, text: str, window: int | None, limit: int | None
) -> tuple[np.ndarray, Text]:
    """Return the windows to predict, and what they are."""
    windows = text_windows(lm, text, window, limit)
    count = len(lm.encode(text))
    wanted = min(int(lm.config.context), LONGEST_WINDOW) if window is None else window
    if count < wanted:
        raise ValueError(
            f"the text has {count:,} tokens, fewer than one window of {wanted:,}: give "
            f"a longer text, or a window of {count:,} or less"
        )
    return windows, Text(_sha256(text), count, *windows.shape)


def _draws(
    lm: LM,
    recipes: Sequence[Recipe],
    calibration: str | Sequence[str] | None,
    seeds: Sequence[int],
    sequences: int,
    length: int | None,
) -> tuple[dict[int, np.ndarray], Calibration]:
    """Return the calibration data of every seed, and what it is."""
    if calibration is None:
        names = ", ".join(r.name for r in recipes if needs_data(r))
        raise ValueError(
            f"{names} need{'' if ',' in names else 's'} data to calibrate on: give "
            f"calibration a text, other than the one that is evaluated"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds are {list(seeds)}: give at least one, and each one once"
        )
    texts = [calibration] if isinstance(calibration, str) else list(calibration)
    stream = np.concatenate([np.zeros(0, np.int32), *map(lm.encode, texts)])
    context = int(lm.config.context)
    if length is None:
        length = min(CALIBRATION_TOKENS, context)
    elif length > context:
        raise ValueError(
            f"length is {length} tokens, more than the model's context of {context}: "
            f"give {context} or fewer"
        )
    try:
        draws = {seed: draw_windows(stream, length, sequences, seed) for seed in seeds}
    except ValueError as error:
        raise ValueError(f"calibration: {error}") from error
    about = Calibration(
        _sha256("".join(texts)), len(stream), sequences, length, tuple(seeds)
    )
    return draws, about


def _refuse_unsuited(lm: LM, recipe: Recipe) -> None:
    """Raise, before any work, when a recipe does not suit the model."""
    try:
        lm.plan(recipe)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name!r}: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _machine() -> dict[str, str]:
    """Return what ran: the device, and the versions of everything that computes."""
    device = jax.devices()[0]
    out = {"device": device.device_kind, "platform": device.platform}
    out["python"] = platform.python_version()
    for package in ("jaxq", "jax", "jaxlib", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    return out
