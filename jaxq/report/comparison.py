"""A comparison on paper: a chart, a page of Markdown, and all numbers as JSON."""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxq.comparison import (
    HEADER,
    LEFT_ALIGNED,
    Comparison,
    Row,
    Verdict,
    aligned,
    legend,
    standing,
    title,
)
from jaxq.report.charts import frontier
from jaxq.report.labels import columns
from jaxq.report.svg import (
    Scale,
    around,
    element,
    horizontal_axis,
    picture,
    text,
    vertical_axis,
)

WIDTH = 880
LEFT, RIGHT, TOP, BOTTOM = 74, 860, 74, 470
ROWS_LEFT, ROWS_RIGHT, ROWS_TOP, ROW = 176, 780, 574, 24

# Said in the file itself, as a picture in Markdown has no style sheet around it.
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.page { fill: #ffffff; }
text { fill: #1d2129; }
.tick { font-size: 12px; fill: #667085; }
.axis { font-size: 13px; fill: #667085; }
.label { font-size: 13px; }
.best { font-weight: 600; }
.title { font-size: 17px; font-weight: 600; }
.subtitle { font-size: 14px; font-weight: 600; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.grid { stroke: #e4e7ec; stroke-width: 1; }
.leader { stroke: #98a1b0; stroke-width: 0.8; fill: none; }
.frontier { fill: none; stroke: #667085; stroke-width: 1.5; stroke-dasharray: 5 4; }
.dot { fill: #2f6fdf; stroke: #ffffff; stroke-width: 1.5; }
.both { fill: #d9730d; }
.spread { stroke: #2f6fdf; stroke-width: 2.5; stroke-opacity: 0.55; }
.spread.both { stroke: #d9730d; }
.halo { stroke: #ffffff; stroke-width: 4; stroke-linejoin: round; }
@media (prefers-color-scheme: dark) {
  .page { fill: #1c1f25; }
  text { fill: #e8eaee; }
  .tick, .axis { fill: #98a1b0; }
  .grid { stroke: #2e333c; }
  .dot { fill: #6ea8ff; stroke: #1c1f25; }
  .dot.both { fill: #f0a04b; }
  .halo { stroke: #1c1f25; }
  .spread { stroke: #6ea8ff; }
  .spread.both { stroke: #f0a04b; }
}
"""


def write_comparison(found: Comparison, folder: str | Path) -> list[Path]:
    """Write ``compare.md``, ``compare.json`` and ``compare.svg`` into a folder.

    Args:
        found: what to write.
        folder: made if it is not there; other files in it are left alone.

    Returns:
        The files, each written completely or not at all.

    Raises:
        OSError: when they cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    data = json.dumps(_without_nan(found.to_dict()), indent=2, allow_nan=False)
    files = {
        "compare.md": markdown(found),
        "compare.json": data + "\n",
        "compare.svg": chart(found) + "\n",
    }
    for name, content in files.items():
        partial = target / f".{name}.{os.getpid()}.partial"
        try:
            partial.write_text(content, "utf-8")
            partial.replace(target / name)
        finally:
            partial.unlink(missing_ok=True)
    return [target / name for name in files]


def markdown(found: Comparison) -> str:
    """Return the table, its legend, the chart, and what it takes to repeat it."""
    header, *rows = aligned(found)
    rule = [
        "-" * len(word) if name in LEFT_ALIGNED else "-" * (len(word) - 1) + ":"
        for name, word in zip(HEADER, header, strict=True)
    ]
    table = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
    return "\n".join(
        [
            f"# {title(found)}",
            "",
            *table,
            "",
            *(f"- {said}" for said in legend(found)),
            "",
            "![stored bits per weight against KL](compare.svg)",
            "",
            *(f"- {said}" for said in _circumstances(found)),
            "",
        ]
    )


def _circumstances(found: Comparison) -> list[str]:
    """Return what another machine needs to measure the same."""
    data, machine = found.calibration, found.machine
    lines = [
        f"text: {found.text.tokens:,} tokens, {found.text.windows:,} windows of "
        f"{found.text.window:,}, SHA-256 `{found.text.sha256}`"
    ]
    if data is not None:
        lines.append(
            f"calibration: {data.tokens:,} tokens, SHA-256 `{data.sha256}`; seeds "
            f"{', '.join(map(str, data.seeds))}, each {data.sequences:,} windows of "
            f"{data.length:,} at random offsets"
        )
    lines.append(", ".join(f"{name} {value}" for name, value in machine.items()))
    return lines


def chart(found: Comparison) -> str:
    """Return an SVG file: bits against KL, and each KL against the best of its size.

    Both axes of loss are logarithmic; error bars are the spread over seeds.
    """
    pairs = zip(found.rows, found.verdicts, strict=True)
    judged = [(r, v) for r, v in pairs if math.isfinite(r["kl"].mean)]
    ranked = [(r, v) for r, v in judged if math.isfinite(v.ratio)]
    height = ROWS_TOP + ROW * len(ranked) + 84
    parts = [
        element("style", STYLE),
        element("rect", width=WIDTH, height=height, rx=12, class_="page"),
        text(f"Bits against quality: {title(found)}", 26, 36, class_="title"),
    ]
    if judged:
        parts += _plane([r for r, _ in judged], {r.name for r, v in judged if v.best})
    if ranked:
        parts += _ranking(ranked)
    parts += _key(height - 20)
    size = {"width": WIDTH, "height": height, "xmlns": "http://www.w3.org/2000/svg"}
    label = "KL to float against stored bits per weight"
    return picture(WIDTH, height, label, parts, **size)


def _plane(rows: Sequence[Row], best: set[str]) -> list[str]:
    """Return bits against KL: axes, frontier, and each recipe with its name."""
    floor = min([r["kl"].mean for r in rows if r["kl"].mean > 0], default=1.0) / 2
    ends = [_ends(row, floor) for row in rows]
    x = Scale(*around([r.bits_per_weight for r in rows]), LEFT, RIGHT)
    y = Scale(*around(sum(ends, ()), log=True), BOTTOM, TOP, log=True)
    spots = [(x(r.bits_per_weight), y(e[1])) for r, e in zip(rows, ends, strict=True)]
    joined = frontier(
        [(r.bits_per_weight, e[1]) for r, e in zip(rows, ends, strict=True)]
    )
    path = " ".join(f"{spots[i][0]:.1f},{spots[i][1]:.1f}" for i in joined)
    places = columns([row.name for row in rows], spots, LEFT, RIGHT)
    parts = [
        horizontal_axis(x, TOP, BOTTOM, "stored bits per weight", 8),
        vertical_axis(y, LEFT, RIGHT, "KL to float, nats per token (log)"),
        element("polyline", points=path, class_="frontier"),
    ]
    names: list[str] = []
    for row, end, spot, place in zip(rows, ends, spots, places, strict=True):
        bar = {"x1": spot[0], "x2": spot[0], "y1": y(end[0]), "y2": y(end[2])}
        weight = " best" if row.name in best else ""
        halo = text(row.name, *place[:2], class_=f"halo label {place[2]}{weight}")
        parts[3:3] = [_leader(*spot, place), halo]  # below every dot
        parts += _dot(row, spot, bar)
        names.append(text(row.name, *place[:2], class_=f"label {place[2]}{weight}"))
    return parts + names


def _ranking(judged: Sequence[tuple[Row, Verdict]]) -> list[str]:
    """Return each KL over that of the best of its size, one line for each recipe."""
    means = {row.name: row["kl"].mean for row, _ in judged}
    ends = []
    for row, verdict in judged:
        unit = means[verdict.against] or 1.0
        low, _, high = _ends(row, unit / 2)
        ends.append((low / unit, verdict.ratio, high / unit))
    bottom = ROWS_TOP + ROW * len(judged)
    reach = sum(ends, (1.0,))
    low, high = min(reach) / 1.04, max(reach) * 1.04
    x = Scale(low, high, ROWS_LEFT, ROWS_RIGHT, log=True)
    parts = [
        text("KL against the best that is not larger (log)", 26, ROWS_TOP - 20,
             class_="subtitle"),
        horizontal_axis(x, ROWS_TOP - 6, bottom, "", 6),
        element("line", x1=x(1.0), x2=x(1.0), y1=ROWS_TOP - 6, y2=bottom,
                class_="frontier"),
    ]  # fmt: skip
    previous = None
    for index, ((row, verdict), end) in enumerate(zip(judged, ends, strict=True)):
        y = ROWS_TOP + ROW * (index + 0.5)
        if previous not in (None, verdict.against):
            edge = y - ROW / 2
            parts.append(
                element("line", x1=26, x2=RIGHT, y1=edge, y2=edge, class_="grid")
            )
        previous = verdict.against
        weight = " best" if verdict.best else ""
        bar = {"x1": x(end[0]), "x2": x(end[2]), "y1": y, "y2": y}
        parts += [
            text(row.name, ROWS_LEFT - 16, y + 4, class_=f"label end{weight}"),
            *_dot(row, (x(end[1]), y), bar),
            text(standing(verdict), RIGHT, y + 4, class_=f"label end{weight}"),
        ]
    return parts


def _ends(row: Row, floor: float) -> tuple[float, float, float]:
    """Return the KL's mean less its spread, the mean, and the mean plus the spread."""
    kl = row["kl"]
    mean, spread = max(kl.mean, floor), kl.spread or 0.0
    return max(mean - spread, min(mean, floor)), mean, mean + spread


def _dot(row: Row, spot: tuple[float, float], bar: Mapping[str, float]) -> list[str]:
    """Return a recipe's dot, and its error bar if it has any."""
    kl = row["kl"]
    activations = any(rule.activation is not None for rule in row.recipe.rules)
    kind = "both" if activations else "weights"
    spread = f" ± {kl.spread:.2g}" if kl.spread else ""
    tip = f"{row.name}: {row.bits_per_weight:.3f} bits, KL {kl.mean:.4g}{spread}"
    cx, cy = spot
    dot = element(
        "circle",
        element("title", html.escape(tip)),
        cx=cx,
        cy=cy,
        r=5,
        class_=f"dot {kind}",
    )
    if not kl.spread:
        return [dot]
    return [dot, element("line", **bar, class_=f"spread {kind}")]


def _leader(px: float, py: float, place: tuple[float, float, str]) -> str:
    """Return the line from a dot to its name."""
    lx, ly, anchor = place
    side = 1 if anchor == "start" else -1
    ly -= 4
    points = f"{px + side * 7:.1f},{py:.1f} {lx - side * 9:.1f},{ly:.1f} "
    return element(
        "polyline", points=points + f"{lx - side * 3:.1f},{ly:.1f}", class_="leader"
    )


def _key(y: float) -> list[str]:
    """Return what the marks mean, in one line."""
    dot = {"cx": 0, "cy": -4, "r": 5}
    dashes = {"x1": -12, "x2": 12, "y1": -4, "y2": -4}
    marks = (
        ("weights only", element("circle", **dot, class_="dot weights")),
        ("weights and activations", element("circle", **dot, class_="dot both")),
        ("spread over calibration draws",
         element("line", **dashes, class_="spread weights")),
        ("nothing is better at no more bits",
         element("line", **dashes, class_="frontier")),
    )  # fmt: skip
    parts, x = [], 38.0
    for said, mark in marks:
        parts.append(element("g", mark, transform=f"translate({x:g},{y:g})"))
        parts.append(text(said, x + 20, y, class_="tick"))
        x += 62 + 6.2 * len(said)
    return parts


def _without_nan(data: object) -> object:
    """Return plain data with None for what JSON has no number for."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
