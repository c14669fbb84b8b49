"""`jaxq compare` from end to end on a tiny model, and how it refuses."""

import io
import json

import pytest
from rich.console import Console

from jaxq.cli.compare import read_seeds, split_names, table
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from tests.cli.test_failures import one_message
from tests.comparison.made_up import comparison, row
from tests.comparison.test_bench import STATIC

SETTINGS = ("--sequences", 2, "--length", 16, "--window", 32, "--limit", 2)


@pytest.fixture
def static(tmp_path):
    """A recipe's file that needs data."""
    path = tmp_path / "static.yaml"
    STATIC.dump(path)
    return path


def test_prints_a_table_and_writes_a_folder(
    jaxq, tiny, text, static, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ran = jaxq(
        "compare", tiny, "--recipes", f"w8a16, {static}", "--text", text,
        "--calibration", text, "--seeds", "4,7", *SETTINGS,
    )  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    for said in ("w8a16", "static", "2 draws of 2 × 16 tokens", "★", "vs best"):
        assert said in ran.stdout
    assert "static seed 7" in ran.stderr
    folder = tmp_path / "compare-tiny"
    data = json.loads((folder / "compare.json").read_text())
    assert data["calibration"]["seeds"] == [4, 7]
    mean = data["recipes"][1]["kl"]["mean"]
    assert f"{mean:.5f}" in ran.stdout
    assert f"{mean:.5f}" in (folder / "compare.md").read_text()
    assert f"{mean:.4g}" in (folder / "compare.svg").read_text()


@pytest.fixture
def made_up(monkeypatch):
    """Measure nothing: the arguments are kept, and the result is made up."""
    seen = {}

    def run(lm, recipes, text, calibration, **settings):
        seen.update(settings, recipes=recipes, calibration=calibration)
        return comparison()

    monkeypatch.setattr("jaxq.cli.compare.run_compare", run)
    return seen


def test_json_alone_goes_to_stdout_alone(
    jaxq, tiny, text, tmp_path, monkeypatch, made_up
):
    monkeypatch.chdir(tmp_path)
    arguments = ("compare", tiny, "-r", "w8a16", "--text", text, *SETTINGS, "--json")
    ran = jaxq(*arguments)
    assert json.loads(ran.stdout) == comparison().to_dict()
    assert not list(tmp_path.iterdir())
    again = jaxq(*arguments, "-o", "here", "--group-size", 32, "--seeds", 2)
    written = json.loads((tmp_path / "here" / "compare.json").read_text("utf-8"))
    assert written == json.loads(again.stdout)
    assert (ran.exit_code, again.exit_code) == (0, 0)
    assert made_up["seeds"] == (0, 1)
    assert made_up["group_size"] == 32
    names = ("sequences", "length", "window", "limit")
    assert [made_up[name] for name in names] == [2, 16, 32, 2]


@pytest.mark.parametrize("flags", [("--json",), ()])
def test_weights_that_fell_back_give_a_code_of_their_own(
    jaxq, tiny, text, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(tmp_path)
    broken = row("gptq", 4.75, [0.03], [10.4], fallbacks={"params/a": "not finite"})
    monkeypatch.setattr(
        "jaxq.cli.compare.run_compare", lambda *_, **__: comparison(rows=(broken,))
    )
    ran = jaxq("compare", tiny, "-r", "w8a16", "--text", text, *SETTINGS, *flags)
    assert ran.exit_code == 3
    assert "params/a" in ran.stdout


def shown(width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(comparison(), wide=width >= 94))
    return console.export_text()


def test_the_table_fits_eighty_columns():
    narrow = shown(80)
    assert "size" not in narrow
    assert "…" not in narrow
    line = next(line for line in narrow.splitlines() if line.startswith("awq"))
    assert line.split() == [
        "awq", "4.760", "0.01250", "±12.0%", "≈", "1.04×", "10.150", "±0.050", "90.00%",
        "12.2",
    ]  # fmt: skip
    assert "0.59 MB" in shown(120)


@pytest.mark.parametrize(
    ("given", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("4, 7", (4, 7)), ("7,", (7,))]
)
def test_seeds(given, seeds):
    assert read_seeds(given) == seeds


def test_names():
    assert split_names(" w4a16,my recipe.yaml ,") == ["w4a16", "my recipe.yaml"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--recipes", "w8a16,w4a61", "did you mean 'w4a16'?"),
        ("--recipes", "none.yaml", "there is no file none.yaml"),
        ("--recipes", " , ", "there is no name in it"),
        ("--seeds", "few", "'few' is neither a number of draws nor seeds"),
        ("--seeds", "0", "0 draws measure nothing"),
        ("--seeds", "-1", "'-1' is neither a number of draws nor seeds"),
    ],
)
def test_options(jaxq, tiny, text, option, value, said):
    arguments = ["compare", tiny, "--recipes", "w8a16", "--text", text]
    message = one_message(jaxq(*arguments, option, value), 2)
    assert said in message
    assert option in message


def test_a_recipe_that_must_see_data(jaxq, tiny, text, static):
    ran = jaxq("compare", tiny, "-r", f"w8a16,{static}", "--text", text)
    message = one_message(ran, 2)
    assert "static must see data: add --calibration" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--text", "no.txt"], "no.txt is no file"),
        (["--calibration", "no.txt"], "no.txt is no file"),
        (["--text", "latin.txt"], "no UTF-8 text (at byte 3)"),
        (["--text", "short.txt"], "9 tokens, fewer than one window of 32"),
        (["-o", "latin.txt"], "latin.txt is a file"),
        (["-o", "nowhere/out"], "nowhere is no folder"),
        (["-r", "nf4,nf4"], "2 recipes are called 'nf4'"),
        (["-r", "odd.json"], "recipe 'odd'"),
        (["--group-size", "32"], "no rule of recipe 'w8a16' has groups"),
    ],
)
def test_what_cannot_be_compared(jaxq, tiny, text, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "short.txt").write_text("import os")
    Recipe("odd", (Rule("*nope*", QuantSpec("int8")),)).dump("odd.json")
    before = sorted(tmp_path.iterdir())
    ran = jaxq("compare", tiny, "-r", "w8a16", "--text", text, *SETTINGS, *change)
    assert said in one_message(ran, 1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_quantized_model(jaxq, small, text):
    ran = jaxq("compare", small[0], "-r", "nf4", "--text", text, "--json")
    assert "give the float model" in one_message(ran, 1)
