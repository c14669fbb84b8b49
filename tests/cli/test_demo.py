"""`jaxq demo` from end to end, on a tiny model in the place of the embedded one."""

import io
import json

import pytest
from rich.console import Console

from jaxq.cli.board import Board
from jaxq.cli.demo import RECIPES as DEMO_RECIPES
from jaxq.report import Result
from tests.tiny_lm import TEXT, write_tiny

RECIPES = ("w8a8", "w4a16")


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    folder = write_tiny(tmp_path / "demo_model", dtype="bfloat16")
    (folder / "eval.txt").write_text(TEXT)
    monkeypatch.setattr("jaxq.lm.DEMO_FOLDER", folder)
    monkeypatch.setattr("jaxq.cli.options.DEMO_FOLDER", folder)
    monkeypatch.setattr("jaxq.cli.demo.SAMPLE_TOKENS", 4)
    monkeypatch.setattr("jaxq.cli.demo.QUICK_RECIPES", RECIPES)


@pytest.mark.usefixtures("embedded")
def test_demo(jaxq, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    ran = jaxq("demo", "--quick", "--report", tmp_path / "report.html")
    assert ran.exit_code == 0, ran.stderr
    for name in ("float", *RECIPES, "perplexity", "top-1", "next"):
        assert name in ran.stdout
    assert str(tmp_path / "report.html") in ran.stdout
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<svg") > 10
    for name in RECIPES:
        assert name in page


@pytest.mark.usefixtures("embedded")
def test_demo_json(jaxq, tmp_path, monkeypatch):
    ran = jaxq("demo", "--quick", "--json", "--report", tmp_path / "report.html")
    rows = json.loads(ran.stdout)
    assert [row["recipe"] for row in rows] == ["float", *RECIPES]
    assert rows[0]["bits"] == 16
    assert 0 < rows[1]["kl"] < rows[2]["kl"] < 1
    assert rows[1]["quantizes_activations"]
    assert rows[2]["bits"] < 8


def test_a_report_in_no_folder_fails_before_the_work(jaxq, tmp_path):
    ran = jaxq("demo", "--report", tmp_path / "nowhere" / "report.html")
    assert ran.exit_code == 1
    assert "nowhere is no folder" in ran.stderr


def test_the_bar_is_full_when_everything_is_done():
    board = Board("title", ("float", "w8a16"))
    whole = Result("float", 16, 100, 10.0)
    for recipe, what, weight in (
        ("float", "evaluating", 1.0),
        ("float", "watching", 0.5),
        ("w8a16", "quantizing", 1.0),
        ("w8a16", "evaluating", 2.0),
        ("w8a16", "measuring", 0.5),
        ("float", "writing", 1.0),
    ):
        board.begin(recipe, what, weight)
        if what == "evaluating":
            board.end(whole)
    board.share(1.0)
    task = board._bar.tasks[0]
    assert task.completed == task.total


def test_the_table_of_the_longest_recipes_fits_eighty_columns():
    board = Board("title", ("float", *DEMO_RECIPES))
    board.end(Result("float", 16, 10_490_000, 13.75, tokens_per_second=125_700.0))
    for name in DEMO_RECIPES:
        board.end(Result(name, 8.111, 5_320_000, 128.3, 0.7438, 0.971, 137.9, 122_800))
    board.finish()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(board.render())
    text = console.export_text()
    assert "…" not in text
    for name in DEMO_RECIPES:
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert line.split()[-3:] == ["97.1%", "137.9", "122,800"]
