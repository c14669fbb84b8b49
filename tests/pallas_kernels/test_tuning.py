"""The autotuner: the fastest tile wins, is written, read back, and used."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq import QuantSpec
from jaxq.ops.accelerated import facts, operands, tuned_tile
from jaxq.ops.problem import Problem
from pallas_kernels import tuning
from pallas_kernels.kernel import TileRow
from pallas_kernels.target import Target
from pallas_kernels.tpu.geometry import Tile
from pallas_kernels.tpu.weight_only_decode import KERNEL

SMALL, LARGE, BROKEN = Tile(16, 128, 128), Tile(16, 256, 256), Tile(16, 128, 256)
TUNABLE = dataclasses.replace(
    KERNEL, tiles=tuple(TileRow("*", 128, t) for t in (SMALL, BROKEN, LARGE, SMALL))
)


@pytest.fixture
def product():
    w = jax.random.normal(jax.random.key(0), (256, 256), jnp.float32)
    q = jaxq.relayout(jaxq.quantize(w, QuantSpec("int8")), "tpu")
    return Problem(jnp.ones((3, 256), jnp.bfloat16), q)


def timer(times):
    """Return the next of some times; a tile that does not fit raises."""
    left = list(times)

    def measure(run):
        assert run().shape == (3, 256)
        value = left.pop(0)
        if value is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return value

    return measure


def tuned(product, times):
    return tuning.tune(
        TUNABLE, facts(product), operands(product), "v5e", timer(times), interpret=True
    )


def test_the_fastest_tile_wins_and_is_used(product, tmp_path):
    best = tuned(product, [3.0, None, 2.0])
    assert best.tile == LARGE
    assert dict(best.tried) == {SMALL: 3.0, BROKEN: float("inf"), LARGE: 2.0}
    path = tmp_path / "tiles.json"
    tuning.save(path, [dataclasses.replace(best, key="tpu.weight_only_decode other")])
    tuning.save(path, [best])
    target = Target("tpu", "v5e", tiles=tuning.load(path, "tpu"))
    assert dict(target.tiles)[best.key] == LARGE
    assert len(target.tiles) == 2
    assert tuned_tile(KERNEL, facts(product), target) == LARGE
    assert tuned_tile(KERNEL, facts(product), Target("tpu", "v5e")) != LARGE
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]


def test_nothing_fits(product):
    with pytest.raises(ValueError, match=r"no tile of \S+ compiles for"):
        tuned(product, [None, None, None])


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tuning.load(path, "tpu")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no table of tiles"):
        tuning.load(path, "tpu")
    path.write_text(json.dumps({"tpu.weight_only_decode x": {"tile": {"q": 1}}}))
    with pytest.raises(ValueError, match="is no Tile"):
        tuning.load(path, "tpu")
