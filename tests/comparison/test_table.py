"""The table of a comparison of chosen numbers, word for word."""

import dataclasses
import json

import pytest

from jaxq.comparison import HEADER, cells, legend
from tests.comparison.made_up import DRAWS, ROWS, comparison, row

GOLDEN = """\
5 recipes on toy, 1.00M parameters

recipe       bits     size  KL              vs best  perplexity      top-1   sec
float      16.000  2.00 MB        –               –  10.000              –     –
w8a8        8.111  1.01 MB  0.00100               ★  10.010         90.00%  12.2
w4a16       4.750  0.59 MB  0.03000           2.50×  10.400         90.00%  12.2
gptq        4.750  0.59 MB  0.01200 ±16.7%        ★  10.200 ±0.100  90.00%  12.2
awq         4.760  0.59 MB  0.01250 ±12.0%  ≈ 1.04×  10.150 ±0.050  90.00%  12.2
w2a16 <&>   2.500  0.31 MB  0.90000               ★  31.000         90.00%  12.2

KL: to float, nats per token, over 12,264 tokens in windows of 512
★ best for its size · 1.50×: so many times the KL of the best that is not larger
±: standard deviation over 3 draws of 128 × 512 tokens
≈: a difference within the spread, so noise"""


def test_golden():
    assert str(comparison()) == GOLDEN


def test_one_draw_has_no_spread_and_says_so():
    rows = (row("a", 4.0, [0.1], [10.0]),)
    one = dataclasses.replace(rows[0].runs[0], seed=7)
    rows = (dataclasses.replace(rows[0], runs=(one,)),)
    found = comparison(rows, dataclasses.replace(DRAWS, seeds=(7,)))
    assert "±" not in str(found).split("\n\n")[1]
    assert any("one draw of 128 × 512 tokens" in line for line in legend(found))


def test_without_calibration_nothing_is_said_of_it():
    found = comparison(ROWS[:2], None)
    assert not any("draw" in line for line in legend(found))
    assert found.to_dict()["calibration"] is None


def test_weights_that_fell_back_are_told():
    why = {"params/a": "the Gram matrix could not be factored", "params/b": "no token"}
    found = comparison(
        (*ROWS, row("broken", 4.0, [0.1, 0.2], [10.0, 10.0], fallbacks=why))
    )
    (line,) = (line for line in legend(found) if line.startswith("!"))
    assert "broken: 2 weights fell back: params/a: the Gram" in line


def test_every_row_has_every_column():
    assert all(len(cell) == len(HEADER) for cell in cells(comparison()))


def test_json_has_everything():
    data = json.loads(json.dumps(comparison().to_dict()))
    assert set(data) == {
        "format", "format_version", "model", "parameters", "text", "calibration",
        "machine", "float", "recipes",
    }  # fmt: skip
    assert data["format_version"] == 1
    assert data["calibration"]["seeds"] == [0, 1, 2]
    assert data["text"] == {
        "sha256": "ab" * 32, "tokens": 88_474, "windows": 24, "window": 512
    }  # fmt: skip
    gptq = data["recipes"][2]
    assert set(gptq) == {
        "recipe", "bits_per_weight", "bytes", "kl", "perplexity", "top1", "seconds",
        "tokens_per_second", "best", "against", "ratio", "noise", "runs", "definition",
    }  # fmt: skip
    assert gptq["kl"] == {
        "mean": pytest.approx(0.012), "spread": pytest.approx(0.002)
    }  # fmt: skip
    assert [run["seed"] for run in gptq["runs"]] == [0, 1, 2]
    assert [run["kl"] for run in gptq["runs"]] == [0.010, 0.012, 0.014]
    assert gptq["definition"]["name"] == "gptq"
    awq = data["recipes"][3]
    assert (awq["against"], awq["best"], awq["noise"]) == ("gptq", False, True)
