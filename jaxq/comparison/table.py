"""A comparison as a table of words: for terminals, for Markdown, for `print`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxq.comparison.spread import Measured, Verdict

if TYPE_CHECKING:
    from jaxq.comparison.content import Comparison, Row

HEADER = ("recipe", "bits", "size", "KL", "vs best", "perplexity", "top-1", "sec")
LEFT_ALIGNED = ("recipe", "KL", "perplexity")  # padded already, or words
BEST, NOISE = "★", "≈"


def cells(found: "Comparison") -> list[tuple[str, ...]]:
    """Return the rows under `HEADER` as text, the float model first.

    Numbers with a spread are padded on both sides, so that they stand one below the
    other however they are aligned.
    """
    rows = [_float_cells(found)]
    judged = zip(found.rows, found.verdicts, strict=True)
    rows += [_cells(row, verdict) for row, verdict in judged]
    columns = [list(column) for column in zip(*rows, strict=True)]
    for name in LEFT_ALIGNED[1:]:
        index = HEADER.index(name)
        columns[index] = _aligned(columns[index])
    return list(zip(*columns, strict=True))


def _float_cells(found: "Comparison") -> tuple[str, ...]:
    whole = found.whole
    return (
        "float", f"{whole.bits_per_weight:.3f}", _megabytes(whole.nbytes), "–", "–",
        f"{whole.perplexity:.3f}", "–", "–",
    )  # fmt: skip


def _cells(row: "Row", verdict: Verdict) -> tuple[str, ...]:
    perplexity, kl = row["perplexity"], row["kl"]
    return (
        row.name,
        f"{row.bits_per_weight:.3f}",
        _megabytes(row.nbytes),
        f"{kl.mean:.5f}{_relative(kl)}",
        standing(verdict),
        f"{perplexity.mean:.3f}{_absolute(perplexity)}",
        f"{row['top1'].mean:.2%}",
        f"{row['seconds'].mean:.1f}",
    )


def _aligned(words: Sequence[str]) -> list[str]:
    """Return ``value ±spread`` with values of one width, and spreads of one width."""
    parts = [word.partition(" ±") for word in words]
    before = max(len(value) for value, _, _ in parts)
    after = max(len(sign + spread) for _, sign, spread in parts)
    return [v.rjust(before) + (sign + spread).ljust(after) for v, sign, spread in parts]


def standing(verdict: Verdict) -> str:
    """Return a verdict in a few letters: ``★``, ``1.62×`` or ``≈ 1.01×``."""
    if verdict.best:
        return BEST
    return f"{NOISE} {verdict.ratio:.2f}×" if verdict.noise else f"{verdict.ratio:.2f}×"


def legend(found: "Comparison") -> list[str]:
    """Return the lines that say what the columns are and what they stand on."""
    text, data = found.text, found.calibration
    predicted = text.windows * (text.window - 1)
    lines = [
        f"KL: to float, nats per token, over {predicted:,} tokens in windows of "
        f"{text.window:,}",
        f"{BEST} best for its size · 1.50×: so many times the KL of the best that is "
        f"not larger",
    ]
    if data is not None:
        count = len(data.seeds)
        lines.append(
            f"±: standard deviation over {count} draws of {data.sequences:,} × "
            f"{data.length:,} tokens"
            if count > 1
            else f"one draw of {data.sequences:,} × {data.length:,} tokens: the spread "
            f"over draws is not known"
        )
    if any(verdict.noise for verdict in found.verdicts):
        lines.append(f"{NOISE}: a difference within the spread, so noise")
    return lines + _fallbacks(found)


def _fallbacks(found: "Comparison") -> list[str]:
    """Say which recipes could not calibrate everything."""
    lines = []
    for row in found.rows:
        if row.fallbacks:
            path, why = next(iter(row.fallbacks.items()))
            lines.append(
                f"! {row.name}: {len(row.fallbacks)} weights fell back: {path}: {why}"
            )
    return lines


def aligned(found: "Comparison") -> list[list[str]]:
    """Return header and rows with every column padded to one width."""
    rows = [HEADER, *cells(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]

    def pad(word: str, width: int, name: str) -> str:
        return word.ljust(width) if name in LEFT_ALIGNED else word.rjust(width)

    return [list(map(pad, row, widths, HEADER)) for row in rows]


def plain(found: "Comparison") -> str:
    """Return the table with aligned columns and its legend."""
    lines = ["  ".join(row).rstrip() for row in aligned(found)]
    return "\n".join([title(found), "", *lines, "", *legend(found)])


def title(found: "Comparison") -> str:
    """Return one line: how many recipes, on what."""
    count = len(found.rows)
    recipes = "1 recipe" if count == 1 else f"{count} recipes"
    return f"{recipes} on {found.model}, {found.parameters / 1e6:.2f}M parameters"


def _relative(value: Measured) -> str:
    """Return the spread as a share of the mean, where there is one to tell."""
    if not value.spread or not value.mean:
        return ""
    return f" ±{value.spread / value.mean:.1%}"


def _absolute(value: Measured) -> str:
    return f" ±{value.spread:.3f}" if value.spread else ""


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
