"""`jaxq inspect --evidence`: what calibration did, in a terminal and for scripts."""

import io
import json

import pytest
from rich.console import Console

from jaxq.checkpoints import save
from jaxq.cli.evidence import evidence_lines, evidence_table
from jaxq.lm import TIMINGS, load_model
from jaxq.report import read_evidence
from tests.report.test_evidence import SINGULAR, metadata


@pytest.fixture
def calibrated(small, tmp_path):
    """A checkpoint whose manifest has evidence."""
    lm = load_model(small[0])
    return save(
        tmp_path / "calibrated",
        lm.params,
        recipe=lm.recipe,
        extra_files=lm.files,
        metadata=metadata(),
    )


def shown(data, width=80):
    """The lines printed for the evidence in a manifest's metadata."""
    found = read_evidence(data)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(evidence_table(found))
    for line in evidence_lines(found):
        console.print(line, soft_wrap=True)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_golden():
    assert shown(metadata()) == [
        "what calibration did",
        "weight            loss  × RTN             sec",
        "─────────────────────────────────────────────",
        "layers_0/attn/q   0.01  0.500 ━━━━━       1.5",
        "layers_1/attn/q  0.005  0.250 ━━          1.5",
        "layers_0/mlp/up  0.015  0.750 ━━━━━━━━    1.5",
        "layers_1/mlp/up   0.02  1.000 ━━━━━━━━━━  1.5",
        "4 weights calibrated in 6.0 s, median loss 0.62 × RTN, 1 fell back",
        "on 8 sequences, 4,096 tokens · one shot: no way",
        "every weight: tokens 4,096 · damping 0.01 · order act",
        "without data: embed/embedding",
        f"fell back: layers_1/mlp/up: {SINGULAR}",
        "layers_1/mlp/up: no token reached 2 of 3 experts",
    ]


def test_columns_that_differ_are_columns():
    data = metadata()
    first = data["evidence"]["params/layers_0/attn/q/kernel"]
    first |= {"tokens": 7, "damping": 1.0, "order": None, "block_loss": [0.5, 0.25]}
    lines = shown(data)
    assert lines[1].split() == [
        "weight", "tokens", "loss", "×", "RTN", "tuned", "damping", "order", "sec"
    ]  # fmt: skip
    assert "0.50×" in lines[3]
    assert not any(line.startswith("every weight") for line in lines)


def test_many_weights_that_fell_back_alike_are_a_line():
    entry = {"fallback": "no token", "tokens": 0}
    data = {"evidence": {f"w{i}": entry for i in range(10)}}
    (line,) = (line for line in shown(data) if line.startswith("fell back"))
    assert line == "fell back: w0, w1, w2, w3 and 6 more: no token"


def test_notes_are_told():
    note = "calibrated in one shot on the float model: it is scanned"
    data = {"evidence": {"a": {"tokens": 5, "note": note}, "b": {"tokens": 5}}}
    assert f"a: {note}" in shown(data)


def test_seconds_lie_beside_the_manifest(jaxq, small, tmp_path):
    lm, entry = load_model(small[0]), "params/layers_0/attn/q/kernel"
    data = metadata()
    del data["evidence"][entry]["seconds"]
    timings = {TIMINGS: json.dumps({entry: 2.5})}
    folder = save(
        tmp_path / "a", lm.params, metadata=data, extra_files=lm.files | timings
    )

    def seconds():
        facts = json.loads(jaxq("inspect", folder, "--json").stdout)
        return facts["evidence"][entry]["seconds"]

    assert seconds() == 2.5
    (folder / TIMINGS).write_text("{broken")
    assert seconds() == 0


def test_inspect_shows_evidence(jaxq, calibrated, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    plain = jaxq("inspect", calibrated)
    assert "params/layers_0/self_attn/q_proj/kernel" in plain.stdout
    assert "1 fell back" in plain.stdout
    assert "--evidence" in plain.stderr
    told = jaxq("inspect", calibrated, "--evidence")
    assert told.exit_code == 0
    assert SINGULAR in told.stdout
    assert "0.250" in told.stdout


def test_json_always_has_it(jaxq, calibrated, small):
    facts = json.loads(jaxq("inspect", calibrated, "--json").stdout)
    entry = facts["evidence"]["params/layers_1/attn/q/kernel"]
    assert entry["tokens"] == 4096
    assert entry["ratio"] == pytest.approx(0.25)
    assert facts["evidence_totals"]["fallbacks"] == 1
    assert facts["calibration"] == metadata()["calibration"]
    bare = json.loads(jaxq("inspect", small[0], "--json").stdout)
    assert {e["loss"] for e in bare["evidence"].values()} <= {None}
    assert bare["evidence_totals"] is bare["calibration"] is None


def test_without_evidence_it_says_so(jaxq, small, tiny):
    for folder in (small[0], tiny):
        told = jaxq("inspect", folder, "--evidence")
        assert told.exit_code == 0
        assert "no evidence" in told.stdout
        assert "--evidence" not in jaxq("inspect", folder).stderr
