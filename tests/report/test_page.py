"""The page: complete, self-contained, and safe whatever it is told."""

import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.report import (
    Channels,
    MatrixError,
    Report,
    Result,
    distribution_of,
    render,
    write_report,
)
from jaxq.report.charts import frontier, heat_map, pareto
from jaxq.report.svg import Scale, around, element, short

RESULTS = (
    Result("float", 16.0, 1600, 10.0, tokens_per_second=1234.0),
    Result("w8a16", 8.0, 800, 10.01, 0.0003, 0.99, 1.0, 1000.0),
    Result("w8a8", 8.0, 800, 10.05, 0.002, 0.98, 1.0, 900.0, True),
    Result("w4a16", 4.5, 450, 10.4, 0.02, 0.93, 2.0, 800.0),
    Result("w2a16", 2.5, 250, 31.0, 0.9, 0.5, 2.0),
)
ERRORS = tuple(
    MatrixError(
        r.recipe, f"params/layers_{i}/{kind}/kernel", kind, i, 0.1, 0.05 + i / 50
    )
    for r in RESULTS[1:]
    for kind in ("mlp/up", "attn/q")
    for i in range(3)
)


@pytest.fixture
def report(rng):
    counted = distribution_of("w < 1", {"params/a & b": rng.standard_t(2, 5000)})
    return Report(
        "the <b>model</b>",
        (("parameters", "5"),),
        RESULTS,
        ERRORS,
        (counted,),
        (counted,),
        (Channels("x", np.abs(rng.normal(size=40))),),
        "import ",
        "<script>alert(1)</script>",
        "w4a16",
    )


class Tags(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    EMPTY = ("meta", "input", "!doctype")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_refers_to_nothing_outside(report):
    page = render(report)
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not {"link", "img", "iframe", "base"} & set(tags.seen)
    names = {name for name, _ in tags.attributes}
    assert not {"src", "href", "onclick", "xlink:href"} & names
    for outside in ("http:", "https:", "//cdn", "@import", "url("):
        assert outside not in page


def test_every_chart_is_a_picture_with_a_name(report):
    charts = re.findall(r"<svg.*?</svg>", render(report), re.S)
    assert len(charts) == 2 + len(RESULTS[1:]) + 2 + 1
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("aria-label")
        for shape in root.iter():
            for name in ("x", "y", "width", "height", "cx", "cy"):
                value = shape.get(name)
                assert value is None or np.isfinite(float(value))
                if name in ("width", "height") and value is not None:
                    assert float(value) >= 0


def test_names_and_samples_are_escaped(report):
    page = render(report)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "the &lt;b&gt;model" in page


def test_the_table_says_what_was_measured(report):
    page = render(report)
    for said in ("4.500", "10.400", "0.02000", "93.00%", "1,234"):
        assert said in page


def test_a_report_of_the_float_model_alone_is_a_page(report):
    bare = dataclasses.replace(
        report, results=RESULTS[:1], errors=(), weights=(), activations=(), channels=()
    )
    assert "<svg" not in render(bare)


def test_no_divergence_and_no_loss_still_make_charts():
    same = [dataclasses.replace(r, kl=0.0, perplexity=10.0) for r in RESULTS[1:]]
    ElementTree.fromstring(pareto(same, lambda r: r.kl, "KL", "nats"))
    worse = [dataclasses.replace(r, perplexity=9.0) for r in RESULTS[1:]]
    ElementTree.fromstring(pareto(worse, lambda r: r.perplexity - 10, "more", "%"))


def test_the_page_is_replaced_completely_or_not_at_all(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    with monkeypatch.context() as broken:
        broken.setattr("jaxq.report.page.render", lambda _: "half\ud800")
        with pytest.raises(UnicodeEncodeError):
            write_report(report, path)
    assert path.read_text() == "old"
    assert write_report(report, path) == path
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_frontier_is_what_nothing_beats(points):
    kept = [points[i] for i in frontier(points)]
    for point in points:
        beaten = any(
            other != point and other[0] <= point[0] and other[1] <= point[1]
            for other in points
        )
        assert (point in kept) == (not beaten)
    assert kept == sorted(set(kept))


def test_heat_map_shades_by_error():
    chart = ElementTree.fromstring(
        heat_map([e for e in ERRORS if e.recipe == "w4a16"], "output")
    )
    cells = list(chart.iter("rect"))
    shades = [float(c.get("style").split(":")[1]) for c in cells]
    assert len(cells) == 6
    assert shades[0] < shades[1] < shades[2] == 1.0


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e5), st.booleans(), st.integers(2, 8))
def test_scales_keep_order_and_ends(low, ratio, log, count):
    scale = Scale(low, low * ratio, 300.0, 20.0, log)
    np.testing.assert_allclose([scale(low), scale(low * ratio)], [300, 20])
    assert scale(low / 2) == scale(low)
    ticks = scale.ticks(count)
    pixels = [scale(t) for t in ticks]
    assert pixels == sorted(pixels, reverse=True)
    assert len(ticks) <= 3 * count + 4
    assert all(low * (1 - 1e-6) <= t <= low * ratio * (1 + 1e-6) for t in ticks)


def test_limits_leave_room():
    low, high = around([2.0, 4.0])
    assert low < 2 < 4 < high
    low, high = around([3.0])
    assert low < 3 < high


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (-2.5, "-2.5"), (0.001, "0.001"), (3e-4, "3e-4"), (12_000, "12k"),
     (1_180_000, "1.18M"), (100, "100"), (2e9, "2G")],
)  # fmt: skip
def test_short_numbers(value, shown):
    assert short(value) == shown


def test_attributes_are_escaped():
    made = element("rect", data_tip='a<b> "c" & d')
    assert ElementTree.fromstring(made).get("data-tip") == 'a<b> "c" & d'
