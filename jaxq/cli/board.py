"""The live table of `jaxq demo`: rows fill up, a bar says how long it will take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from jaxq.cli.screen import loss_color, size
from jaxq.report import Result

# What one recipe takes, in the units of the bar: quantizing, evaluating, layers.
PER_RECIPE = 1.0 + 2.0 + 0.5
PER_RUN = 1.0 + 0.5 + 1.0  # the float model, its activations, a line of text

CAPTION = (
    "bits: stored, per weight · KL: to float, nats · top-1: the same first choice\n"
    "sec: to quantize, compiling included · tok/s: forward pass of the evaluation"
)


class Board:
    """A table of recipes, and the bar below it.

    Attributes:
        title: above the table.
        rows: what is known of each recipe: its result, or what is being done.
    """

    def __init__(self, title: str, recipes: Sequence[str]) -> None:
        self.title = title
        self.rows: dict[str, Result | str] = dict.fromkeys(recipes, "")
        self._base: Result | None = None
        self._done = self._weight = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("[dim]elapsed"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            speed_estimate_period=600,
        )
        total = PER_RUN + PER_RECIPE * (len(recipes) - 1)
        self._task = self._bar.add_task("", total=total)
        self._running = True

    @contextmanager
    def shown(self, console: Console) -> Iterator[None]:
        """Show the board while the block runs; the finished table stays."""
        with Live(console=console, get_renderable=self.render, refresh_per_second=8):
            yield

    def begin(self, recipe: str, what: str, weight: float) -> None:
        """Say what is being done, and which part of the whole it is."""
        self.share(1.0)
        self._done, self._weight = self._done + self._weight, weight
        if not isinstance(self.rows[recipe], Result):
            self.rows[recipe] = what
        self._bar.update(self._task, description=f"{recipe}: {what}")

    def share(self, done: float) -> None:
        """Say how much of what was begun is done, from 0 to 1."""
        self._bar.update(self._task, completed=self._done + self._weight * done)

    def end(self, result: Result) -> None:
        """Put a recipe's result into its row."""
        self._base = self._base or result
        self.rows[result.recipe] = result

    def finish(self) -> None:
        """Take the bar away."""
        self._running = False

    def render(self) -> RenderableType:
        """Return the table, and the bar while there is something to do."""
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            caption=CAPTION,
            caption_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("recipe", style="bold", no_wrap=True)
        for name in (
            "bits", "size", "perplexity", "KL", "top-1", "sec", "tok/s",
        ):  # fmt: skip
            table.add_column(name, justify="right", no_wrap=True)
        for recipe, row in self.rows.items():
            if isinstance(row, Result):
                table.add_row(recipe, *self._cells(row))
            else:
                waiting = Text("…" if row else "·", style="yellow" if row else "dim")
                table.add_row(Text(recipe, style="" if row else "dim"), waiting)
        return Group(table, self._bar) if self._running else table

    def _cells(self, row: Result) -> list[str | Text]:
        base = self._base or row
        speed = row.tokens_per_second
        shared: list[str | Text] = [
            f"{row.bits:.3f}",
            size(row.nbytes),
            f"{row.perplexity:.2f}",
        ]
        rate = f"{speed:,.0f}" if speed > 0 else "–"
        if row is base:
            return [*shared, "–", "–", "–", rate]
        color = loss_color(row.kl)
        worse = round(100 * (row.perplexity / base.perplexity - 1), 1) + 0.0  # no -0.0
        more = f" {worse:+.1f}%"
        shared[2] = Text.assemble(f"{row.perplexity:.2f}", (more, color))
        return [
            *shared,
            Text(f"{row.kl:.5f}", style=color),
            f"{row.top1:.1%}",
            f"{row.seconds:.1f}",
            rate,
        ]
