"""A comparison on paper: the numbers behind the marks, and what is written."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxq.report import write_comparison
from jaxq.report.comparison import chart, markdown
from tests.comparison.made_up import ROWS, comparison, row

SVG = "{http://www.w3.org/2000/svg}"


def marks(picture, tag, *words):
    """The elements of a tag whose class has all these words."""
    found = picture.iter(f"{SVG}{tag}")
    return [e for e in found if set(words) <= set(e.get("class", "").split())]


def dots(picture):
    """Dots by recipe: the one of bits against KL, and the one of the ranking."""
    out = {}
    for dot in picture.iter(f"{SVG}circle"):
        if (tip := dot.find(f"{SVG}title")) is not None:
            out.setdefault(tip.text.split(":")[0], []).append(dot)
    return out


@pytest.fixture(scope="module")
def picture():
    return ElementTree.fromstring(chart(comparison()))


def test_dots_are_where_their_numbers_say(picture):
    """Pixels are linear in bits and in log KL: fit both, and look at what is left."""
    found = dots(picture)
    assert list(found) == [r.name for r in ROWS]
    bits = [r.bits_per_weight for r in ROWS]
    x = [float(found[r.name][0].get("cx")) for r in ROWS]
    y = [float(found[r.name][0].get("cy")) for r in ROWS]
    losses = np.log([r["kl"].mean for r in ROWS])
    for values, pixels, slope in ((bits, x, 1), (losses, y, -1)):
        fit = np.polyfit(values, pixels, 1)
        assert fit[0] * slope > 0
        np.testing.assert_allclose(np.polyval(fit, values), pixels, atol=0.02)


def test_error_bars_are_a_standard_deviation_each_way(picture):
    """Of 0.010, 0.012, 0.014: from 0.010 to 0.014 on the scale of the dots."""
    found = dots(picture)
    y = [float(found[r.name][0].get("cy")) for r in ROWS]
    scale = np.polyfit(np.log([r["kl"].mean for r in ROWS]), y, 1)
    bars = [b for b in marks(picture, "line", "spread") if b.get("y1") != b.get("y2")]
    assert len(bars) == 2  # the two recipes with seeds
    ends = [float(bars[0].get("y1")), float(bars[0].get("y2"))]
    np.testing.assert_allclose(
        ends, np.polyval(scale, np.log([0.010, 0.014])), atol=0.02
    )
    assert bars[0].get("x1") == bars[0].get("x2") == found["gptq"][0].get("cx")


def test_the_ranking_is_the_ratio_to_the_best(picture):
    found = dots(picture)
    ratios = np.log([1, 2.5, 1, 12.5 / 12, 1])
    x = [float(found[r.name][1].get("cx")) for r in ROWS]
    fit = np.polyfit(ratios, x, 1)
    np.testing.assert_allclose(np.polyval(fit, ratios), x, atol=0.02)
    shown = [e.text or "" for e in picture.iter(f"{SVG}text")]
    standings = [said for said in shown if re.fullmatch(r"★|(≈ )?\d\.\d\d×", said)]
    assert standings == ["★", "2.50×", "★", "≈ 1.04×", "★"]


def test_marks_tell_weights_from_activations(picture):
    found = dots(picture)
    assert "both" in found["w8a8"][0].get("class")
    assert "weights" in found["gptq"][0].get("class")


def test_the_frontier_joins_what_nothing_beats(picture):
    found = dots(picture)
    (line,) = marks(picture, "polyline", "frontier")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    best = [found[name][0] for name in ("w2a16 <&>", "gptq", "w8a8")]
    expected = [(float(d.get("cx")), float(d.get("cy"))) for d in best]
    np.testing.assert_allclose(points, expected, atol=0.06)


def test_the_picture_stands_alone(picture):
    assert picture.get("aria-label")
    text = chart(comparison())
    for outside in ("https:", "@import", "url(", "href", "var("):
        assert outside not in text
    assert re.findall("http:[^\"']*", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize(
    "rows",
    [
        (row("same", 8.0, [0.0], [10.0]),),
        (row("same", 8.0, [0.0], [10.0]), row("other", 8.0, [0.1], [10.0])),
        (row("lost", 2.0, [math.inf], [math.inf]),),
        (row("wide", 4.0, [0.01, 0.5, 0.01], [10.0] * 3),),  # a spread beyond the mean
    ],
)
def test_extreme_numbers_still_make_a_picture(rows):
    picture = ElementTree.fromstring(chart(comparison(rows)))
    for shape in picture.iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "height"):
            value = shape.get(name)
            assert value is None or math.isfinite(float(value))


def test_markdown_has_the_table_and_what_it_takes_to_repeat_it():
    page = markdown(comparison())
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + len(ROWS)
    assert len({line.count("|") for line in lines}) == 1
    assert "| gptq      |  4.750 | 0.59 MB | 0.01200 ±16.7% |       ★ |" in page
    for said in (
        "ab" * 32, "cd" * 32, "seeds 0, 1, 2", "128 windows of 512", "jaxq 0.1.0",
        "![stored bits per weight against KL](compare.svg)",
    ):  # fmt: skip
        assert said in page
    assert "calibration" not in markdown(comparison(ROWS[:2], None))


def test_the_folder_holds_three_files(tmp_path):
    found = comparison()
    (tmp_path / "notes.txt").write_text("mine")
    paths = write_comparison(found, tmp_path)
    assert [p.name for p in paths] == ["compare.md", "compare.json", "compare.svg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "compare.json", "compare.md", "compare.svg", "notes.txt"
    ]  # fmt: skip
    assert paths[0].read_text("utf-8") == markdown(found)
    data = json.loads(paths[1].read_text("utf-8"))
    assert data["recipes"][2]["kl"] == found.to_dict()["recipes"][2]["kl"]
    assert ElementTree.fromstring(paths[2].read_text("utf-8")).tag == f"{SVG}svg"


def test_infinity_is_null_in_json(tmp_path):
    rows = (row("lost", 2.0, [math.inf], [math.inf]),)
    path = write_comparison(comparison(rows), tmp_path / "new" / "folder")[1]
    assert json.loads(path.read_text("utf-8"))["recipes"][0]["kl"]["mean"] is None


def test_a_failed_file_leaves_the_old_one(tmp_path, monkeypatch):
    write_comparison(comparison(), tmp_path)
    before = (tmp_path / "compare.svg").read_text("utf-8")
    monkeypatch.setattr("jaxq.report.comparison.chart", lambda _: "half\ud800")
    with pytest.raises(UnicodeEncodeError):
        write_comparison(comparison(), tmp_path)
    assert (tmp_path / "compare.svg").read_text("utf-8") == before
    assert len(list(tmp_path.iterdir())) == 3
