"""Evidence: read from a manifest, summed up, drawn."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.report import Report, describe_calibration, read_evidence, render
from jaxq.report.charts import loss_bars
from tests.report.test_page import RESULTS, Tags

SINGULAR = "the Gram matrix of <x> could not be factored"
# (layer, kind): loss over rounding to nearest, whose loss is 0.02
RATIOS = {
    (0, "attn/q"): 0.5,
    (1, "attn/q"): 0.25,
    (0, "mlp/up"): 0.75,
    (1, "mlp/up"): 1.0,
}


def metadata():
    """What a manifest says of four weights, of which one fell back."""
    entries = {
        f"params/layers_{layer}/{kind}/kernel": {
            "tokens": 4096,
            "loss": 0.02 * ratio,
            "rtn_loss": 0.02,
            "damping": 0.01,
            "order": "act",
            "seconds": 1.5,
            "fallback": None,
            "solver": "gptq",
        }
        for (layer, kind), ratio in RATIOS.items()
    }
    last = entries["params/layers_1/mlp/up/kernel"]
    last |= {"fallback": SINGULAR, "experts": [0, 4096, 0]}
    entries["params/embed/embedding"] = {"tokens": 0, "loss": None, "solver": "rtn"}
    calibration = {
        "sequences": 8,
        "tokens": 4096,
        "mode": "one shot",
        "reason": "no way",
    }
    return {"evidence": entries, "calibration": calibration}


@pytest.fixture
def found():
    return read_evidence(metadata())


def test_totals(found):
    assert found
    np.testing.assert_allclose([t.ratio for t in found.tensors], list(RATIOS.values()))
    assert found.fallbacks == {SINGULAR: ["params/layers_1/mlp/up/kernel"]}
    assert found.totals() == {
        "tensors": 4,
        "without_data": 1,
        "fallbacks": 1,
        "idle_experts": 2,
        "median_ratio": pytest.approx(0.625),
        "seconds": 6.0,
    }


def test_weights_that_needed_no_data_stand_apart(found):
    assert [t.path for t in found.others] == ["params/embed/embedding"]
    assert not read_evidence({"evidence": {"w": {"tokens": 0, "loss": None}}})


def test_seconds_may_lie_apart():
    entries = {"a": {"tokens": 1}, "b": {"tokens": 1, "seconds": 2.0}}
    found = read_evidence({"evidence": entries}, {"a": 1.5, "b": 7.0, "c": "x"})
    assert [tensor.seconds for tensor in found.tensors] == [1.5, 2.0]


def test_what_it_was_calibrated_on(found):
    said = describe_calibration(found.calibration)
    assert said == ["8 sequences, 4,096 tokens", "one shot: no way"]
    assert describe_calibration({}) == []


@pytest.mark.parametrize(
    "strange",
    [
        {},
        {"evidence": None},
        {"evidence": []},
        {"evidence": {}},
        {"evidence": {"w": 3}},
    ],
)
def test_none_is_no_failure(strange):
    found = read_evidence(strange)
    assert not found
    assert found.totals()["median_ratio"] is None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ("tokens", "loss", "rtn_loss", "damping", "order", "seconds", "fallback",
          "solver", "note", "experts", "block_loss")  # fmt: skip


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(FIELDS), PLAIN), PLAIN)
def test_whatever_a_manifest_says_can_be_shown(entry, calibration):
    found = read_evidence({"evidence": {"w": entry}, "calibration": calibration})
    assert "nan" not in loss_bars(found)
    assert len(found.tensors) + len(found.others) == 1
    describe_calibration(found.calibration)


def bars(chart):
    """Bars by the parameter that their tooltip begins with."""
    shapes = ElementTree.fromstring(chart).iter("rect")
    return {bar.get("data-tip").split()[0]: bar for bar in shapes}


def test_bars_are_as_high_as_the_loss(found):
    shown = bars(loss_bars(found))
    heights = [
        float(shown[f"layers_{layer}/{kind}/kernel"].get("height"))
        for layer, kind in RATIOS
    ]
    unit = heights[-1]  # the one at 1.0
    np.testing.assert_allclose(
        np.array(heights) / unit, list(RATIOS.values()), atol=0.001
    )
    picture = ElementTree.fromstring(loss_bars(found))
    limits = [
        float(e.get("y1")) for e in picture.iter("line") if e.get("class") == "limit"
    ]
    top = float(shown["layers_1/mlp/up/kernel"].get("y"))
    np.testing.assert_allclose(top, limits[-1], atol=0.01)


def test_bars_of_one_layer_are_in_one_column(found):
    shown = bars(loss_bars(found))
    x = {name: float(bar.get("x")) for name, bar in shown.items()}
    assert x["layers_0/attn/q/kernel"] == x["layers_0/mlp/up/kernel"]
    assert x["layers_0/attn/q/kernel"] < x["layers_1/attn/q/kernel"]


def test_fallbacks_stand_out(found):
    shown = bars(loss_bars(found))
    fell = [n for n, bar in shown.items() if "outlier" in bar.get("class")]
    assert fell == ["layers_1/mlp/up/kernel"]
    assert SINGULAR in shown[fell[0]].get("data-tip")


def test_the_report_has_a_section(found):
    report = Report(
        "m", (), RESULTS, evidence=(("w4a16-gptq", found), ("other", found))
    )
    page = render(report)
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "What calibration did" in page
    assert "median 0.62 × rounding to nearest" in page
    assert "one shot: no way" in page
    assert "&lt;x&gt; could not be factored: layers_1/mlp/up" in page
    assert "<x>" not in page
    ids = re.findall(r'id="(e\w*)"', page)
    assert sorted(ids) == ["e0", "e1", "ep0", "ep1"]


def test_a_report_without_evidence_has_no_section():
    assert "What calibration did" not in render(Report("m", (), RESULTS))
