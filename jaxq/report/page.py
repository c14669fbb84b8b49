"""The page: sections around the charts, one HTML file without any reference outside."""

import html
import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxq.report.charts import (
    channel_profile,
    heat_map,
    histogram,
    loss_bars,
    pareto,
)
from jaxq.report.content import Report, Result
from jaxq.report.evidence import Evidence, describe_calibration

FOLDER = Path(__file__).parent


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page, completely or not at all.

    Raises:
        OSError: when it cannot be written; an older file is then untouched.
    """
    target = Path(path).absolute()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(render(report), "utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(report: Report) -> str:
    """Return the page as HTML: styles, charts and the few lines of script inside."""
    small = [r for r in report.results if r.recipe != "float"]
    sections = [
        _head(report),
        _tiles(report.results),
        _table(report.results),
        _pareto(report.results, small),
        _errors(report),
        _evidence(report),
        _histograms("Weights", _WEIGHTS, report.weights),
        _histograms("Activations", _ACTIVATIONS, report.activations),
        _channels(report),
        _sample(report),
        _protocol(),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(report.model)}: what quantization cost</title>\n"
        f"<style>\n{_file('page.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<div id="tip"></div>\n<script>\n{_file("page.js")}</script>\n'
        "</body>\n</html>\n"
    )


_WEIGHTS = (
    "Each kind of matrix over all layers, in units of its standard deviation. Few "
    "values far out (red, beyond 6σ) stretch the scale of everything that shares it: "
    "small groups keep that local."
)
_ACTIVATIONS = (
    "What goes into each kind of product, on the evaluation text. Weight-only recipes "
    "leave it alone; w8a8, w4a8 and fp8 round it as well, token by token."
)


def _head(report: Report) -> str:
    facts = " · ".join(f"{_safe(value)} {_safe(name)}" for name, value in report.facts)
    return (
        f"<h1>What quantization cost {_safe(report.model)}</h1>\n"
        f'<p class="lead">{facts}</p>'
    )


def _tiles(results: Sequence[Result]) -> str:
    whole = results[0]
    fours = [r for r in results[1:] if r.bits < 6]
    if not fours:
        return ""
    best = min(fours, key=lambda r: r.kl)
    facts = (
        (f"{whole.nbytes / best.nbytes:.2f}× smaller", f"with {best.recipe}, the best "
         f"recipe below 6 bits: {best.bits:.2f} bits per weight"),
        (f"{best.perplexity / whole.perplexity - 1:+.1%}",
         f"perplexity, {whole.perplexity:.2f} → {best.perplexity:.2f}"),
        (f"{best.kl:.4f} nats", "divergence from the float model, per token"),
        (f"{best.top1:.1%}", "of tokens: the same first choice as the float model"),
    )  # fmt: skip
    tiles = "".join(
        f'<div class="card tile"><b>{_safe(big)}</b><span>{_safe(small)}</span></div>'
        for big, small in facts
    )
    return f'<div class="tiles">{tiles}</div>'


def _table(results: Sequence[Result]) -> str:
    names = (
        "recipe", "bits per weight", "size", "perplexity", "KL to float",
        "top-1 agreement", "seconds to quantize", "tokens/s",
    )  # fmt: skip
    most_bits = max(r.bits for r in results)
    most_kl = max(r.kl for r in results) or 1.0
    rows = []
    for r in results:
        whole = r.recipe == "float"
        speed = f"{r.tokens_per_second:,.0f}" if r.tokens_per_second > 0 else "–"
        cells = (
            _safe(r.recipe),
            f"{r.bits:.3f}{_meter(r.bits / most_bits)}",
            f"{r.nbytes / 1e6:.2f} MB",
            f"{r.perplexity:.3f}",
            "–" if whole else f"{r.kl:.5f}{_meter(r.kl / most_kl, 'warm')}",
            "–" if whole else f"{r.top1:.2%}",
            "–" if whole else f"{r.seconds:.1f}",
            speed,
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        "<h2>Every recipe</h2>\n"
        '<p class="note">Bits and bytes are measured from what is stored: codes, '
        "scales, zero points, and whatever stayed float.</p>\n"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _meter(share: float, kind: str = "") -> str:
    return f'<span class="meter {kind}"><i style="width:{share:.1%}"></i></span>'


def _pareto(results: Sequence[Result], small: Sequence[Result]) -> str:
    if len(small) < 2:
        return ""
    base = results[0].perplexity
    charts = (
        pareto(
            small,
            lambda r: 100 * (r.perplexity / base - 1),
            "perplexity above float, % (log)",
            "% more perplexity than float",
        ),
        pareto(small, lambda r: r.kl, "KL to float, nats (log)", "nats per token"),
    )
    cards = "".join(f'<div class="card">{chart}</div>' for chart in charts)
    return (
        "<h2>Bits against quality</h2>\n"
        "<p>Down and to the left is better. Nothing here beats the recipes on the "
        "dashed line in both at once.</p>\n"
        '<p class="legend"><span><i></i>weights only</span><span><i class="both"></i>'
        'weights and activations</span><span><i class="none"></i>no loss at all (drawn '
        'at the bottom)</span><span><i class="dash"></i>best for their size</span>'
        "</p>\n"
        f'<div class="pair">{cards}</div>'
    )


def _errors(report: Report) -> str:
    names = list(dict.fromkeys(e.recipe for e in report.errors))
    if not names:
        return ""
    charts = {
        name: heat_map([e for e in report.errors if e.recipe == name], "output")
        for name in names
    }
    return (
        "<h2>Where the error is</h2>\n"
        "<p>How far each product's output is from the float one, on real activations: "
        "‖XW − XŴ‖ / ‖XW‖. The stronger the colour, the worse, within one recipe.</p>\n"
        + _tabs("r", charts, "w4a16" if "w4a16" in names else names[0])
    )


def _evidence(report: Report) -> str:
    if not report.evidence:
        return ""
    panels = {name: _evidence_panel(found) for name, found in report.evidence}
    return (
        "<h2>What calibration did</h2>\n"
        "<p>The error of each product on the calibration data, over that of the same "
        "weight rounded to nearest (the dashed line): lower is better, above the line "
        "is worse than not calibrating. Red weights fell back.</p>\n"
        + _tabs("e", panels, report.evidence[0][0])
    )


def _evidence_panel(found: Evidence) -> str:
    """Return the bars of one recipe, what it saw, and what fell back."""
    said = [f"{len(found.tensors)} weights"]
    if found.ratio is not None:
        said.append(f"median {found.ratio:.2f} × rounding to nearest")
    said += describe_calibration(found.calibration)
    lines = "".join(
        f"<li>{_safe(reason)}: {_safe(', '.join(_short(p) for p in paths))}</li>"
        for reason, paths in found.fallbacks.items()
    )
    fell = f'<p class="alarm">Fell back:</p><ul>{lines}</ul>' if lines else ""
    return f'<p class="note">{_safe(" · ".join(said))}</p>{loss_bars(found)}{fell}'


def _short(path: str) -> str:
    return path.removeprefix("params/").removesuffix("/kernel")


def _tabs(group: str, panels: Mapping[str, str], chosen: str) -> str:
    """Return panels of which one is shown, by name; no script."""
    parts, rules = [], []
    for index, name in enumerate(panels):
        checked = " checked" if name == chosen else ""
        parts.append(
            f'<input type="radio" name="{group}" id="{group}{index}"{checked}>'
            f'<label for="{group}{index}">{_safe(name)}</label>'
        )
        rules.append(
            f"#{group}{index}:checked ~ #{group}p{index} {{ display: block; }}"
        )
    for index, panel in enumerate(panels.values()):
        parts.append(
            f'<div class="panel card scroll" id="{group}p{index}">{panel}</div>'
        )
    return f'<style>{" ".join(rules)}</style><div class="tabs">{"".join(parts)}</div>'


def _histograms(title: str, lead: str, found: Iterable) -> str:
    cards = "".join(f'<div class="card">{histogram(d)}</div>' for d in found)
    if not cards:
        return ""
    return f'<h2>{title}</h2>\n<p>{lead}</p>\n<div class="grid-3">{cards}</div>'


def _channels(report: Report) -> str:
    if not report.channels:
        return ""
    cards = "".join(
        f'<div class="card">{channel_profile(c)}</div>' for c in report.channels
    )
    return (
        "<h2>Channels</h2>\n"
        "<p>Language models put their largest activations into few input channels, the "
        "same for every token. One scale per token must then cover them, and the other "
        "channels are left with few steps.</p>\n"
        f'<div class="pair">{cards}</div>'
    )


def _sample(report: Report) -> str:
    if not report.sample:
        return ""
    return (
        f"<h2>What it writes with {_safe(report.sample_recipe)}</h2>\n"
        f'<div class="card"><pre><b>{_safe(report.prompt)}</b>{_safe(report.sample)}'
        "</pre></div>"
    )


def _protocol() -> str:
    return (
        "<h2>How this was measured</h2>\n"
        '<p class="note">The text is one stream of tokens, cut into windows that do '
        "not overlap; in each, every token but the first is predicted. Perplexity is "
        "exp of the mean negative log likelihood, in float32. KL is KL(float ‖ "
        "quantized) per token, in nats; top-1 agreement is the share of tokens for "
        "which both find the same token likeliest. Tokens/s is the forward pass of "
        "that evaluation on this machine, compiling left out; seconds to quantize "
        "include compiling. "
        f"jaxq {_safe(_version())}.</p>"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("jaxq")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _file(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def _safe(content: str) -> str:
    return html.escape(content, quote=True)
