"""Comparing recipes on a tiny model, against doing it by hand."""

import hashlib

import numpy as np
import pytest

from jaxq.comparison import compare, needs_data
from jaxq.evaluate import draw_windows, evaluate_text
from jaxq.lm import load_model
from jaxq.presets import PRESETS
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from tests.tiny_lm import TEXT, write_tiny

DATA = "def area(width, height):\n    return width * height\n" * 20
STATIC = Recipe(
    "static",
    (
        Rule("*", QuantSpec("int8", "channel"), ops=("gather",)),
        Rule(
            "*",
            QuantSpec("int8", "channel"),
            QuantSpec("int8", "tensor"),
            static=True,
        ),
    ),
)
SETTINGS = {"sequences": 2, "length": 16, "window": 32, "limit": 4}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_model(
        write_tiny(tmp_path_factory.mktemp("lm") / "tiny", num_hidden_layers=1)
    )


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def found(lm, steps):
    recipes = ["w8a16", STATIC]
    return compare(
        lm, recipes, TEXT, DATA, seeds=(3, 5), progress=steps.append, **SETTINGS
    )


def test_every_run_is_what_one_does_by_hand(lm, found):
    stream = lm.encode(DATA)
    for row in found.rows:
        for run in row.runs:
            data = None
            if row.name == "static":
                data = draw_windows(stream, 16, 2, run.seed)
            small = lm.quantize(row.recipe, data)
            exact = evaluate_text(small, TEXT, lm, window=32, limit=4)
            np.testing.assert_allclose(run.kl, exact.kl, rtol=1e-5)
            np.testing.assert_allclose(run.perplexity, exact.perplexity, rtol=1e-6)
            assert run.top1 == exact.top1
            assert run.nbytes == small.nbytes
            assert run.bits_per_weight == small.bits_per_weight
            assert run.seconds > 0
    whole = evaluate_text(lm, TEXT, window=32, limit=4)
    np.testing.assert_allclose(found.whole.perplexity, whole.perplexity, rtol=1e-6)
    assert (found.whole.kl, found.whole.top1) == (0, 1)


def test_seeds_matter_to_recipes_that_see_data(found):
    free, static = found.rows
    assert [run.seed for run in free.runs] == [None]
    assert [run.seed for run in static.runs] == [3, 5]
    assert static.runs[0].kl != static.runs[1].kl
    values = [run.kl for run in static.runs]
    np.testing.assert_allclose(static["kl"].mean, np.mean(values))
    np.testing.assert_allclose(static["kl"].spread, abs(np.diff(values))[0] / 2**0.5)
    assert free["kl"].spread == 0


def test_the_same_seed_gives_the_same_numbers(lm, found):
    again = compare(lm, [STATIC], TEXT, DATA, seeds=(5,), **SETTINGS)
    assert again.rows[0].runs[0].kl == found.rows[1].runs[1].kl
    assert again.rows[0]["kl"].spread is None


def test_what_was_measured_is_written_down(lm, found):
    assert found.text.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert found.text.tokens == len(TEXT)
    assert (found.text.windows, found.text.window) == (4, 32)
    data = found.calibration
    assert data.sha256 == hashlib.sha256(DATA.encode()).hexdigest()
    assert (data.tokens, data.sequences, data.length) == (len(DATA), 2, 16)
    assert data.seeds == (3, 5)
    assert set(found.machine) == {
        "device", "platform", "python", "jaxq", "jax", "jaxlib", "numpy"
    }  # fmt: skip
    assert compare(lm, ["w8a16"], TEXT, DATA, **SETTINGS).calibration is None


def test_progress_never_goes_back_and_ends(found, steps):
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total == 4
    finished = [(s.recipe, s.seed) for s in steps if s.what == "done"]
    assert finished == [("float", None), ("w8a16", None), ("static", 3), ("static", 5)]
    runs = [step.run for step in steps if step.run is not None]
    assert runs == [found.whole, *(run for row in found.rows for run in row.runs)]


def test_logits_too_large_to_keep_are_made_again(lm, found, monkeypatch):
    monkeypatch.setattr("jaxq.comparison.bench.REFERENCE_BYTES", 0)
    again = compare(lm, ["w8a16"], TEXT, **SETTINGS)
    assert again.rows[0].runs[0].kl == found.rows[0].runs[0].kl


def test_group_sizes_change_what_has_groups(lm):
    found = compare(lm, ["w8a16", "nf4"], TEXT, group_size=16, **SETTINGS)
    assert [row.name for row in found.rows] == ["w8a16", "nf4-g16"]
    small = lm.quantize("nf4", group_size=16)
    assert found.rows[1].nbytes == small.nbytes


def test_which_recipes_need_data():
    assert needs_data(STATIC)
    assert not needs_data(PRESETS["w4a16"])
    assert not needs_data(PRESETS["w8a8"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipes": []}, "there is no recipe to compare"),
        ({"recipes": ["w4a61"]}, "did you mean 'w4a16'"),
        ({"recipes": ["nf4", "nf4"]}, "2 recipes are called 'nf4'"),
        ({"recipes": [Recipe("float", STATIC.rules)]}, "recipes are called 'float'"),
        ({"calibration": None}, "static needs data to calibrate on"),
        ({"calibration": "import"}, "6 tokens, fewer than one window of 16"),
        ({"calibration": DATA[:17]}, "2 different windows of 16, fewer than the 8"),
        ({"calibration": []}, "0 tokens, fewer than one window"),
        ({"text": "import os"}, "9 tokens, fewer than one window of 32"),
        ({"seeds": ()}, r"seeds are \[\]: give at least one"),
        ({"seeds": (1, 1)}, r"seeds are \[1, 1\].*each one once"),
        ({"seeds": (-1,)}, "seed is -1"),
        ({"length": 65}, "length is 65 tokens.*context of 64"),
        ({"window": 65}, "window is 65 tokens.*context of 64"),
        ({"group_size": 16}, "no rule of recipe 'static' has groups"),
        ({"recipes": [Recipe("mine", (Rule("*nope*", QuantSpec("int8")),))]},
         "recipe 'mine'.*nope"),
    ],
)  # fmt: skip
def test_refuses_before_any_run(lm, change, said):
    arguments = {"recipes": [STATIC], "text": TEXT, "calibration": DATA} | SETTINGS
    arguments |= {"sequences": 8} | change
    ran = []
    with pytest.raises(ValueError, match=said):
        compare(lm, progress=ran.append, **arguments)
    assert not ran


def test_refuses_a_quantized_model(lm):
    with pytest.raises(ValueError, match="quantized already: give the float model"):
        compare(lm.quantize("w8a16"), ["nf4"], TEXT)
