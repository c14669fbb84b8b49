"""`quantize_to`: block by block into a folder, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxq import load_model, quantize_to
from jaxq.checkpoints.errors import CheckpointError
from jaxq.method import gptq
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from tests.tiny_lm import TEXT, write_tiny

# one width of weights: one compilation
SHAPE = {"intermediate_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 3}
SPEC = QuantSpec("uint3", 32, symmetric=False)
RECIPE = Recipe(
    "tiny-gptq",
    (
        Rule("*", QuantSpec("int8"), ops=("gather",)),
        Rule("*lm_head*"),
        Rule("*", SPEC, solver=gptq()),
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 256, (9, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", **SHAPE)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return quantize_to(load_model(model, lazy=True), out, RECIPE, TOKENS)


def contents(folder):
    """Every file's bytes but the timings'."""
    files = (path for path in folder.iterdir() if path.name != "timings.json")
    return {path.name: path.read_bytes() for path in files}


def test_a_streamed_model_is_the_one_made_in_memory(model, whole):
    small = load_model(model).quantize(RECIPE, TOKENS)
    back = load_model(whole.path)
    assert jax.tree.structure(back.params) == jax.tree.structure(small.params)
    for a, b in zip(
        jax.tree.leaves(back.params), jax.tree.leaves(small.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert back.recipe == RECIPE
    assert back.calibration["tokens"] == TOKENS.size
    without = lambda e: {k: v for k, v in e.items() if k != "seconds"}
    assert {p: without(e) for p, e in back.evidence.items()} == {
        p: without(e) for p, e in small.evidence.items()
    }
    seen = {p: e["tokens"] for p, e in back.evidence.items()}
    assert set(seen.values()) == {TOKENS.size, 0}
    assert seen["params/embed_tokens/embedding"] == 0


def test_whatever_block_a_run_dies_in_the_resumed_one_ends_with_the_same_bytes(
    model, whole, tmp_path
):
    class Killed(BaseException):
        """What no handler catches."""

    out = tmp_path / "out"

    def die_after(count):
        def progress(row, done, total):
            if done == count:
                raise Killed

        return progress

    lm = load_model(model, lazy=True)
    deaths = []
    for count in (3, 8, 16, 22):
        with pytest.raises(Killed):
            quantize_to(
                lm, out, RECIPE, TOKENS, resume=bool(deaths), progress=die_after(count)
            )
        deaths.append(count)
        assert not out.exists()
    done = quantize_to(lm, out, RECIPE, TOKENS, resume=True)
    assert done.resumed == 3
    assert contents(out) == contents(whole.path)
    assert not out.with_name("out.partial").exists()


def test_another_recipe_or_text_does_not_resume(model, tmp_path):
    out = tmp_path / "out"

    def progress(row, done, total):
        if done == 8:
            raise KeyboardInterrupt

    lm = load_model(model, lazy=True)
    with pytest.raises(KeyboardInterrupt):
        quantize_to(lm, out, RECIPE, TOKENS, progress=progress)
    with pytest.raises(CheckpointError, match=r"calibration\.sha256: was"):
        quantize_to(lm, out, RECIPE, TOKENS + 1, resume=True)
    with pytest.raises(CheckpointError, match=r"recipe\.rules"):
        quantize_to(lm, out, RECIPE, TOKENS, 16, resume=True)
    with pytest.raises(CheckpointError, match="--resume"):
        quantize_to(lm, out, RECIPE, TOKENS)


def test_nothing_to_resume_is_said(model, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        quantize_to(
            load_model(model, lazy=True), tmp_path / "out", RECIPE, TOKENS, resume=True
        )


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume(model, tmp_path):
    """The command itself, killed at random moments until it is through."""
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    RECIPE.dump(recipe)
    text.write_text(TEXT * 3)
    command = [sys.executable, "-m", "jaxq", "quantize", str(model), "--json"]
    command += ["--recipe", str(recipe), "--calibration", str(text)]
    run = lambda *more: subprocess.run(
        [*command, *more], capture_output=True, text=True, check=True
    )
    start = time.perf_counter()
    run("-o", str(tmp_path / "whole"))
    whole = time.perf_counter() - start
    out, rng = tmp_path / "out", np.random.default_rng(0)
    for _ in range(4):
        resume = ["--resume"] if out.with_name("out.partial").exists() else []
        process = subprocess.Popen(
            [*command, "-o", str(out), *resume],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=float(rng.uniform(0.4, 1.0)) * whole)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if out.exists():
            break
    if not out.exists():
        resume = ["--resume"] if out.with_name("out.partial").exists() else ["--force"]
        facts = json.loads(run("-o", str(out), *resume).stdout)
        assert facts["fallbacks"] == {}
    assert contents(out) == contents(tmp_path / "whole")
