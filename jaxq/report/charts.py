"""The charts of a report, each a function from numbers to SVG."""

import math
from collections.abc import Callable, Sequence

from jaxq.report.content import (
    OUTLIER_SIGMAS,
    Channels,
    Distribution,
    MatrixError,
    Result,
)
from jaxq.report.evidence import Evidence, TensorEvidence
from jaxq.report.measure import place
from jaxq.report.svg import (
    Scale,
    around,
    element,
    horizontal_axis,
    picture,
    short,
    text,
    vertical_axis,
)


def pareto(
    results: Sequence[Result],
    measure: Callable[[Result], float],
    title: str,
    unit: str,
) -> str:
    """Return bits against a loss (log), with the recipes that nothing beats joined.

    Args:
        results: quantized recipes.
        measure: the loss; smaller is better.
        title: of the vertical axis.
        unit: said behind the value in tooltips.
    """
    width, height, left, right, top, bottom = 520, 346, 62, 500, 34, 300
    shown = [r for r in results if math.isfinite(measure(r))]
    floor = min([measure(r) for r in shown if measure(r) > 0], default=1.0) / 2

    def loss(result: Result) -> float:
        return max(measure(result), floor)

    x = Scale(*around([r.bits for r in shown]), left, right)
    y = Scale(*around([loss(r) for r in shown], log=True), bottom, top, log=True)
    best = frontier([(r.bits, loss(r)) for r in shown])
    path = " ".join(f"{x(shown[i].bits):.1f},{y(loss(shown[i])):.1f}" for i in best)
    parts = [
        horizontal_axis(x, top, bottom, "stored bits per weight"),
        vertical_axis(y, left, right, title),
        element("polyline", points=path, class_="frontier"),
    ]
    spots = [(x(r.bits), y(loss(r))) for r in shown]
    for (px, py), result in zip(spots, shown, strict=True):
        kind = "both" if result.quantizes_activations else "weights"
        kind += (
            "" if measure(result) > 0 else " none"
        )  # a logarithm has no place for it
        tip = (
            f"{result.recipe}\n{result.bits:.3f} bits per weight\n"
            f"{measure(result):.4g} {unit}"
        )
        parts.append(
            element("circle", cx=px, cy=py, r=6, class_=f"dot {kind}", data_tip=tip)
        )
    for name, (lx, ly), anchor in _labels(shown, spots, right):
        parts.append(text(name, lx, ly, class_=f"label {anchor}"))
    return picture(width, height, f"{title} against stored bits per weight", parts)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other beats in both, by the first number.

    Example:
        >>> frontier([(4, 0.2), (3, 0.5), (5, 0.3), (8, 0.1)])
        [1, 0, 3]
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    best, found = math.inf, []
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def heat_map(errors: Sequence[MatrixError], measure: str) -> str:
    """Return errors of one recipe: a row per kind of matrix, a column per layer.

    Args:
        errors: of one recipe.
        measure: ``output`` or ``weight``.
    """
    kinds = list(dict.fromkeys(e.kind for e in errors))
    layers = sorted({e.layer for e in errors if e.layer is not None})
    left, top, high, right = 170, 30, 34, 1000
    wide = (right - left) / max(len(layers), 1)
    largest = max((getattr(e, measure) for e in errors), default=0) or 1.0
    parts = [
        text(str(n), left + wide * (i + 0.5), top - 10, class_="tick middle")
        for i, n in enumerate(layers)
    ]
    parts.append(text("layer", left - 12, top - 10, class_="tick end"))
    for row, kind in enumerate(kinds):
        y = top + row * high
        parts.append(text(kind, left - 12, y + high / 2 + 4, class_="name end"))
        for error in (e for e in errors if e.kind == kind):
            x, span = left, right - left
            if error.layer is not None:
                x, span = left + wide * layers.index(error.layer), wide
            value = getattr(error, measure)
            parts.append(_cell(error, value, value / largest, (x, y, span, high)))
    height = top + high * len(kinds) + 6
    return picture(right + 4, height, f"{measure} error per layer and matrix", parts)


def loss_bars(evidence: Evidence) -> str:
    """Return each weight's loss over its rounding to nearest: a row of bars per kind.

    The dashed line is rounding to nearest itself; a weight that fell back is marked.
    """
    kinds: dict[str, list[tuple[int, TensorEvidence]]] = {}
    for tensor in evidence.tensors:
        kind, layer = place(tensor.path)
        row = kinds.setdefault(kind, [])
        row.append((len(row) if layer is None else layer, tensor))
    layers = sorted({layer for row in kinds.values() for layer, _ in row})
    left, right, top, high = 170, 1000, 30, 66
    wide = (right - left) / max(len(layers), 4)
    parts = [
        text(str(n), left + wide * (i + 0.5), top - 10, class_="tick middle")
        for i, n in enumerate(layers)
        if wide > 18 or i % 4 == 0
    ]
    parts.append(text("layer", left - 12, top - 10, class_="tick end"))
    for index, (kind, row) in enumerate(kinds.items()):
        bottom = top + high * (index + 1) - 22
        y = Scale(0.0, MOST_LOSS, bottom, bottom - 44)
        parts += [
            text(kind, left - 12, bottom - 12, class_="name end"),
            element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="grid"),
        ]
        for layer, tensor in row:
            parts.append(_loss_bar(tensor, left + wide * layers.index(layer), wide, y))
        reach = left + wide * len(layers)
        parts.append(
            element("line", x1=left, x2=reach, y1=y(1), y2=y(1), class_="limit")
        )
    height = top + high * len(kinds) + 8
    return picture(right + 4, height, "loss over that of rounding to nearest", parts)


MOST_LOSS = 1.15  # bars end there, over rounding to nearest


def _loss_bar(tensor: TensorEvidence, x: float, wide: float, y: Scale) -> str:
    """Return one weight's bar, its number, and what is known of it as a tooltip."""
    ratio = tensor.ratio
    known = (
        (tensor.path.removeprefix("params/"), True),
        (f"{ratio or 0:.3f} × rounding to nearest", ratio is not None),
        (f"{tensor.tokens:,} tokens", True),
        (f"damping {tensor.damping or 0:g}", tensor.damping is not None),
        (f"order {tensor.order}", tensor.order is not None),
        (f"fell back: {tensor.fallback}", tensor.fallback is not None),
    )
    top, worse = y(1.0 if ratio is None else ratio), (ratio or 0) > 1
    bar = element(
        "rect",
        x=x + wide * 0.14,
        y=top,
        width=wide * 0.72,
        height=y.start - top,
        rx=2,
        class_="bar outlier" if tensor.fallback else "bar worse" if worse else "bar",
        data_tip="\n".join(said for said, there in known if there),
    )
    if wide < 30:
        return bar
    shown = "–" if ratio is None else f"{ratio:.2f}"
    return bar + text(shown, x + wide / 2, y.start + 14, class_="tick middle")


def histogram(found: Distribution) -> str:
    """Return a histogram with a logarithmic height and its outliers marked."""
    width, height, left, right, top, bottom = 330, 210, 40, 320, 40, 168
    reach = float(found.edges[-1])
    x = Scale(-reach, reach, left, right)
    y = Scale(0.7, max(float(found.counts.max()), 10) * 1.5, bottom, top, log=True)
    parts = [vertical_grid(y, left, right)]
    for i, count in enumerate(found.counts):
        if count:
            low, high = float(found.edges[i]), float(found.edges[i + 1])
            parts.append(_bar(low, high, int(count), x, y))
    for edge in (-OUTLIER_SIGMAS, OUTLIER_SIGMAS):
        parts.append(
            element("line", x1=x(edge), x2=x(edge), y1=top, y2=bottom, class_="limit")
        )
    for tick in x.ticks(6):
        parts.append(text(f"{tick:g}σ", x(tick), bottom + 16, class_="tick middle"))
    said = f"largest {found.largest:.1f}σ · {found.outliers:,} of {short(found.total)}"
    parts += [
        text(found.title, 0, 11, class_="title"),
        text(f"{said} beyond {OUTLIER_SIGMAS:g}σ", 0, 29, class_="tick"),
        text(found.largest_at.removeprefix("params/"), 0, bottom + 36, class_="tick"),
    ]
    return picture(width, height, f"histogram of {found.title}", parts)


def vertical_grid(y: Scale, left: float, right: float) -> str:
    """Return the grid of a logarithmic count."""
    lines = []
    for power in range(0, 12, 2):
        if 10**power <= y.high:
            py = y(10.0**power)
            lines.append(
                element("line", x1=left, x2=right, y1=py, y2=py, class_="grid")
            )
            label = "1" if power == 0 else f"10{_SUPERSCRIPTS[power]}"
            lines.append(text(label, left - 5, py + 4, class_="tick end"))
    return "".join(lines)


def channel_profile(found: Channels) -> str:
    """Return the largest magnitude of every input channel; far ones are marked."""
    width, height, left, right, top, bottom = 500, 160, 40, 490, 34, 130
    values = [float(v) for v in found.largest]
    middle = sorted(values)[len(values) // 2]
    x = Scale(0, len(values), left, right)
    y = Scale(0, max(values) * 1.05 or 1.0, bottom, top)
    parts = [vertical_axis(y, left, right, "")]
    far = 0
    for index, value in enumerate(values):
        outlying = value > 6 * middle
        far += outlying
        parts.append(
            element(
                "rect",
                x=x(index),
                y=y(value),
                width=max(x(1) - x(0) - 0.2, 0.6),
                height=bottom - y(value),
                class_="bar outlier" if outlying else "bar",
                data_tip=f"channel {index}\nlargest |x| {value:.3g}\n"
                f"{value / (middle or 1):.1f}× the median channel",
            )
        )
    most = max(values) / (middle or 1)
    note = f"largest channel {most:.1f}× the median · {far} beyond 6×"
    parts += [
        text(found.title, 0, 9, class_="title"),
        text(note, 0, 26, class_="tick"),
        text(f"{len(values)} input channels", right, bottom + 18, class_="tick end"),
    ]
    return picture(width, height, f"channels of {found.title}", parts)


_SUPERSCRIPTS = {2: "²", 4: "⁴", 6: "⁶", 8: "⁸", 10: "¹⁰"}

Spot = tuple[float, float]


def _labels(
    shown: Sequence[Result], spots: Sequence[Spot], right: float
) -> list[tuple[str, Spot, str]]:
    """Place a name beside each dot, away from the names already placed."""
    placed: list[tuple[str, Spot, str]] = []
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in spots]
    for result, (px, py) in zip(shown, spots, strict=True):
        length = 6.6 * len(result.recipe)
        options = [
            (px + 10, py + 4, "start"),
            (px - 10, py + 4, "end"),
            (px, py - 11, "middle"),
            (px, py + 20, "middle"),
            (px + 8, py - 10, "start"),
            (px + 8, py + 17, "start"),
            (px - 8, py - 10, "end"),
            (px - 8, py + 17, "end"),
        ]

        def box(option: tuple[float, float, str], length: float = length):
            ox, oy, anchor = option
            shift = {"start": 0.0, "middle": length / 2, "end": length}[anchor]
            return (ox - shift, oy - 11, ox - shift + length, oy + 3)

        def cost(option: tuple[float, float, str]) -> float:
            x0, y0, x1, y1 = box(option)
            hits = sum(
                x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in taken
            )
            return hits - 1 + 10 * (x1 > right + 18 or x0 < 64)

        best = min(options, key=cost)
        taken.append(box(best))
        placed.append((result.recipe, best[:2], best[2]))
    return placed


def _cell(
    error: MatrixError, value: float, share: float, box: tuple[float, ...]
) -> str:
    x, y, wide, high = box
    tip = (
        f"{error.path.removeprefix('params/')}\n"
        f"output error {error.output:.2%}\nweight error {error.weight:.2%}"
    )
    shade = element(
        "rect",
        x=x + 1.5,
        y=y + 1.5,
        width=wide - 3,
        height=high - 3,
        rx=4,
        class_="cell",
        style=f"fill-opacity:{0.06 + 0.94 * share:.3f}",
        data_tip=tip,
    )
    dark = " strong" if share > 0.8 else ""
    label = text(
        f"{value:.1%}", x + wide / 2, y + high / 2 + 4, class_=f"value middle{dark}"
    )
    return shade + label


def _bar(low: float, high: float, count: int, x: Scale, y: Scale) -> str:
    far = max(abs(low), abs(high)) > OUTLIER_SIGMAS
    return element(
        "rect",
        x=x(low),
        y=y(count),
        width=max(x(high) - x(low) - 0.3, 0.8),
        height=max(y.start - y(count), 1.0),
        class_="bar outlier" if far else "bar",
        data_tip=f"{low:.1f}σ to {high:.1f}σ\n{count:,} values",
    )
