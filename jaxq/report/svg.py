"""A few lines of SVG: elements as strings, scales from numbers to pixels, axes."""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence


def element(tag: str, *children: str, **attributes: object) -> str:
    """Return ``<tag ...>children</tag>``; attributes are escaped, children are not.

    An underscore in an attribute's name is a hyphen, one at its end is dropped.

    Example:
        >>> element("rect", class_="bar", data_tip='a "b"')
        '<rect class="bar" data-tip="a &quot;b&quot;"></rect>'
    """
    parts = [tag]
    for name, value in attributes.items():
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if _is_float(value) else value
        key = name.rstrip("_").replace("_", "-")
        parts.append(f'{key}="{html.escape(str(shown), quote=True)}"')
    return f"<{' '.join(parts)}>{''.join(children)}</{tag}>"


def text(content: str, x: float, y: float, **attributes: object) -> str:
    """Return a text element, its content escaped."""
    return element("text", html.escape(content), x=x, y=y, **attributes)


def picture(
    width: float, height: float, label: str, children: Iterable[str], /, **more: object
) -> str:
    """Return a chart that scales with the page and says what it shows.

    Other attributes are added, for instance a ``width`` and ``height`` of its own.
    """
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        **more,
    )


@dataclasses.dataclass(frozen=True)
class Scale:
    """A map from numbers ``low..high`` to pixels ``start..stop``, linear or log."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a number; what lies outside is put on the border."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round numbers inside the scale, about ``count`` of them."""
        if self.log:
            return _log_ticks(self.low, self.high, count)
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def around(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return limits with a little room around the values."""
    low, high = min(values), max(values)
    if log:
        return low / 1.6, high * 1.6
    room = (high - low or abs(high) or 1.0) * 0.08
    return low - room, high + room


def short(value: float) -> str:
    """Return a number as a label: ``0.001``, ``12.5``, ``3.2M``.

    Example:
        >>> [short(v) for v in (0.00012, 0.25, 3.0, 12.34, 5_246_208)]
        ['1.2e-4', '0.25', '3', '12.3', '5.25M']
    """
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}".replace(
                ".0", ""
            )
    if size >= 0.001:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def horizontal_axis(
    scale: Scale, top: float, bottom: float, title: str, count: int = 5
) -> str:
    """Return grid lines, about ``count`` labels and a title for a scale along x."""
    lines = []
    for tick in scale.ticks(count):
        x = scale(tick)
        lines.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        lines.append(text(short(tick), x, bottom + 16, class_="tick middle"))
    middle = (scale.start + scale.stop) / 2
    lines.append(text(title, middle, bottom + 36, class_="axis middle"))
    return "".join(lines)


def vertical_axis(scale: Scale, left: float, right: float, title: str) -> str:
    """Return grid lines, labels and a title for a scale along y."""
    lines = []
    for tick in scale.ticks():
        y = scale(tick)
        lines.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        lines.append(text(short(tick), left - 7, y + 4, class_="tick end"))
    lines.append(text(title, left - 44, scale.stop - 12, class_="axis"))
    return "".join(lines)


def _is_float(value: object) -> bool:
    return isinstance(value, float) or type(value).__module__ == "numpy"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999) * power


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in decades for d in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) <= count + 2:
            return found
    return found[:: math.ceil(len(found) / count)]
