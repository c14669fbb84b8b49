"""Evidence in a terminal: what calibration did to each weight, what fell back."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jaxq.report import Evidence, TensorEvidence, describe_calibration

SHOWN_PATHS = 4  # of the weights of which one thing is said
BAR = 10  # letters of a bar that is as long as rounding to nearest
COLUMNS = ("tokens", "loss", "× RTN", "tuned", "damping", "order", "sec")


def evidence_table(found: Evidence) -> Table:
    """Return one row per calibrated weight; what all have in common is left out."""
    table = Table(
        title="what calibration did",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    rows = [_cells(tensor) for tensor in found.tensors]
    alike = _alike(rows)
    shown = [name for name in COLUMNS if name not in alike]
    table.add_column("weight", overflow="fold")
    for name in shown:
        left = name in ("× RTN", "order")
        table.add_column(
            name,
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=name != "order",
        )
    for tensor, cells in zip(found.tensors, rows, strict=True):
        fell, worse = tensor.fallback is not None, (tensor.ratio or 0) > 1
        style = "red" if fell else "yellow" if worse else "green"
        words = [_with_bar(tensor, style) if n == "× RTN" else cells[n] for n in shown]
        table.add_row(short(tensor.path), *words, style="red" if fell else "")
    return table


def _cells(tensor: TensorEvidence) -> dict[str, str]:
    """Return what is known of a weight, in words; nothing where it is not known."""
    ratio, tuned = tensor.ratio, tensor.block_loss
    return {
        "tokens": f"{tensor.tokens:,}",
        "loss": "" if tensor.loss is None else f"{tensor.loss:.3g}",
        "× RTN": "" if ratio is None else f"{ratio:.3f}",
        "tuned": f"{tuned[1] / tuned[0]:.2f}×" if tuned and tuned[0] else "",
        "damping": "" if tensor.damping is None else f"{tensor.damping:g}",
        "order": tensor.order or "",
        "sec": f"{tensor.seconds:.1f}" if tensor.seconds else "",
    }


def _alike(rows: list[dict[str, str]]) -> dict[str, str]:
    """Return the columns that say the same of every weight, or nothing of any."""
    same = {n: rows[0][n] for n in COLUMNS if len({row[n] for row in rows}) == 1}
    settings = ("tokens", "damping", "order")
    return {n: v for n, v in same.items() if not v or (len(rows) > 1 and n in settings)}


def _with_bar(tensor: TensorEvidence, style: str) -> Text:
    """Return the ratio and a bar of that length."""
    if tensor.ratio is None:
        return Text("–")
    length = min(round(BAR * tensor.ratio), BAR + 1)
    return Text.assemble(f"{tensor.ratio:.3f} ", ("━" * length, style))


def evidence_lines(found: Evidence) -> Iterator[Text]:
    """Yield what there is to say below the table: totals, data, fallbacks, experts."""
    totals = found.totals()
    said = [f"{totals['tensors']} weights calibrated"]
    if found.seconds:
        said[0] += f" in {found.seconds:.1f} s"
    if found.ratio is not None:
        said.append(f"median loss {found.ratio:.2f} × RTN")
    said.append(f"{totals['fallbacks'] or 'none'} fell back")
    yield Text(", ".join(said))
    if data := describe_calibration(found.calibration):
        yield Text("on " + " · ".join(data), style="dim")
    alike = _alike([_cells(tensor) for tensor in found.tensors])
    if known := [f"{name} {words}" for name, words in alike.items() if words]:
        yield Text("every weight: " + " · ".join(known), style="dim")
    if found.others:
        paths = [tensor.path for tensor in found.others]
        yield Text(f"without data: {listed(paths)}", style="dim")
    for note, paths in found.notes.items():
        yield Text(f"{listed(paths)}: {note}", style="yellow")
    for reason, paths in found.fallbacks.items():
        yield Text.assemble(("fell back: ", "bold red"), f"{listed(paths)}: {reason}")
    for tensor in found.tensors:
        if tensor.idle:
            yield Text(
                f"{short(tensor.path)}: no token reached {tensor.idle} of "
                f"{len(tensor.experts)} experts",
                style="yellow",
            )


def listed(paths: Sequence[str]) -> str:
    """Return the first few paths, and how many there are besides."""
    more = len(paths) - SHOWN_PATHS
    names = ", ".join(map(short, paths[:SHOWN_PATHS]))
    return f"{names} and {more} more" if more > 0 else names


def short(path: str) -> str:
    """Return a path without what all of them begin and end with."""
    return path.removeprefix("params/").removesuffix("/kernel")
