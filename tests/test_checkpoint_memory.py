"""Reading and converting take no more memory than a shard and what is returned.

Quantizing into another library's format takes no more for a deeper model.
"""

import pytest

from benchmarks.checkpoint_memory import BOUND, DEPTHS, INNER, QUANTIZE, WIDTH, run

pytestmark = pytest.mark.slow

CONVERTED = [
    ("float", "float", False),
    ("gptq", "compressed-tensors", False),
    ("gptq", "bitsandbytes", True),
]


@pytest.mark.parametrize("name", ["float", "gptq", "compressed-tensors"])
def test_reading_takes_what_is_returned_and_part_of_a_shard(name):
    out = run(name, "read")
    assert out["shards"] > 1
    assert out["rise"] > out["returned"] / 2, "the measurement misses what is there"
    assert out["extra"] <= BOUND * out["shard"]


@pytest.mark.parametrize(("source", "to", "requantize"), CONVERTED)
def test_converting_takes_part_of_a_shard(source, to, requantize):
    out = run(source, to, requantize)
    assert out["rise"] > 1
    copies = 4 * WIDTH * INNER * 4 / 2**20 if requantize else 0.0  # in float32
    assert out["rise"] <= BOUND * out["shard"] + copies


def test_quantizing_into_a_format_takes_no_more_for_a_deeper_model():
    one, other = (run("float", f"{QUANTIZE} gptq", layers=n) for n in DEPTHS)
    more = other["written"] - one["written"]
    assert more > 0.6 * other["written"]
    assert one["rise"] > 1
    assert other["rise"] - one["rise"] < more / 3, (one["rise"], other["rise"])
