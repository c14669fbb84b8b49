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

from jaxq import convert, load_model, quantize_to, streaming
from jaxq.checkpoints.errors import CheckpointError, ExistsError, UnsupportedError
from jaxq.codecs.folder import SafetensorsSink
from jaxq.convert import TARGETS
from jaxq.method import chain, gptq, rtn, smoothquant
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from tests.tiny_lm import TEXT, write_tiny

# one width of weights: one compilation
SHAPE = {"intermediate_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 3}
# which GPTQ, AWQ and some others can express
SPEC = QuantSpec("uint4", 32, symmetric=False, scale="float16")
RECIPE = Recipe(
    "tiny-gptq",
    (
        Rule("*", QuantSpec("int8"), ops=("gather",)),
        Rule("*lm_head*"),
        Rule("*", SPEC, solver=gptq()),
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 256, (9, 16)).astype(np.int32)


class Killed(BaseException):
    """What no handler catches."""


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


@pytest.fixture(scope="module")
def solved(model):
    """The model that is written in other formats, made in memory."""
    return load_model(model).quantize(RECIPE, TOKENS)


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_another_format_is_the_same_wherever_its_run_dies(
    model, solved, tmp_path, monkeypatch, to
):
    """While blocks are solved, and while what was solved is converted."""
    convert(solved, tmp_path / "whole", to)
    out, lm = tmp_path / "out", load_model(model, lazy=True)

    def progress(row, done, total):
        if done == 12:
            raise Killed

    with pytest.raises(Killed):
        quantize_to(lm, out, RECIPE, TOKENS, to=to, progress=progress)
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsSink, "close", lambda *_: progress(0, 12, 0))
        with pytest.raises(Killed):
            quantize_to(lm, out, RECIPE, TOKENS, to=to, resume=True)
    assert os.listdir(out.with_name("out.partial") / "converted") == ["data.partial"]
    assert not out.exists()
    done = quantize_to(lm, out, RECIPE, TOKENS, to=to, resume=True)
    assert done.resumed == 3
    assert done.conversion.lossless is False, "the embedding is a float again"
    assert done.conversion.counts()["exact"] == 21
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert done.bytes == (out / "model.safetensors").stat().st_size


def test_a_model_is_replaced_by_one_of_another_format(model, tmp_path, monkeypatch):
    """And what a run leaves that dies just after is not mistaken for work to do."""
    out, lm = tmp_path / "out", load_model(model, lazy=True)
    recipe = Recipe("rounded", (*RECIPE.rules[:2], Rule("*", SPEC)))
    quantize_to(lm, out, recipe, to="awq")
    awq = contents(out)
    with pytest.raises(ExistsError, match="--force"):
        quantize_to(lm, out, recipe, to="gptq")

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("jaxq.checkpoints.partial.tidy", die)
        with pytest.raises(Killed):
            quantize_to(lm, out, recipe, to="gptq", overwrite=True)
    assert load_model(out).codec == "gptq"
    left = out.with_name("out.partial")
    assert contents(left / "converted") == awq
    with pytest.raises(ExistsError, match="nothing to resume"):
        quantize_to(lm, out, recipe, to="gptq", resume=True)
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(ExistsError, match="no intact checkpoint"):
        quantize_to(lm, out, recipe, overwrite=True)
    assert load_model(out).codec == "gptq"


def test_another_format_does_not_resume(model, tmp_path):
    def progress(row, done, total):
        if done == 12:
            raise Killed

    out, lm = tmp_path / "out", load_model(model, lazy=True)
    with pytest.raises(Killed):
        quantize_to(lm, out, RECIPE, TOKENS, to="gptq", progress=progress)
    with pytest.raises(CheckpointError, match='to: was "gptq", is "awq"'):
        quantize_to(lm, out, RECIPE, TOKENS, to="awq", resume=True)
    with pytest.raises(CheckpointError, match='to: was "gptq", is "jaxq"'):
        quantize_to(lm, out, RECIPE, TOKENS, resume=True)


SPECS = {
    "float32 scales": QuantSpec("uint4", 32, symmetric=False),
    "half": SPEC,
    "ggml": QuantSpec("int8", 32, scale="float16"),
    "nf4": QuantSpec("nf4", 64, scale=QuantSpec("dynamic8", 256, center=True)),
    "tiles": QuantSpec("fp8_e4m3", (32, 32)),
    "nvfp4": QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor")),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_a_format_cannot_express_is_known_before(model, tmp_path, name):
    """Exactly what is refused when all is solved is refused before anything is."""
    recipe = Recipe(name, (*RECIPE.rules[:2], Rule("*", SPECS[name])))
    lazy, small = load_model(model, lazy=True), load_model(model).quantize(recipe)
    todo = lazy.plan(recipe)

    def refusal(run, *arguments):
        try:
            run(*arguments)
        except UnsupportedError as error:
            return str(error)
        return ""

    formats = sorted(TARGETS.keys() - {"jaxq"})
    before = [refusal(streaming.rehearse, lazy, todo, to, 10**9) for to in formats]
    after = [refusal(convert, small, tmp_path / to, to) for to in formats]
    assert list(map(bool, before)) == list(map(bool, after))
    told = set(filter(None, before))
    assert all(f"recipe {name!r} makes weights that cannot be" in why for why in told)
    assert 0 < len(told) < len(formats) - 1, "some format has it, beside floats"


def test_a_format_refuses_before_anything_is_solved(model, tmp_path):
    """Scales that no module can take over, where attention repeats heads."""
    shape = SHAPE | {"num_key_value_heads": 2}
    lm = load_model(write_tiny(tmp_path / "model", **shape), lazy=True)
    method = chain(smoothquant(0.5), rtn())
    rules = (*RECIPE.rules[:2], Rule("*", QuantSpec("int8"), solver=method))

    def progress(row, done, total):
        raise AssertionError("something was solved")

    with pytest.raises(UnsupportedError, match="attention repeats heads"):
        quantize_to(
            lm,
            tmp_path / "out",
            Recipe("smooth", rules),
            TOKENS,
            to="compressed-tensors",
            progress=progress,
        )
    assert os.listdir(tmp_path) == ["model"]
    fit = load_model(model, lazy=True)
    todo = fit.plan(Recipe("smooth", rules))
    bytes_after = sum(row.bytes_after for row in todo if row.is_quantized)
    assert streaming.rehearse(fit, todo, "compressed-tensors", 10**9) > bytes_after


def test_what_is_refused_late_is_kept(model, tmp_path, monkeypatch):
    recipe = Recipe("late", (*RECIPE.rules[:2], Rule("*", SPECS["float32 scales"])))
    out, lm = tmp_path / "out", load_model(model, lazy=True)
    monkeypatch.setattr(streaming, "rehearse", lambda *_: 0)
    with pytest.raises(UnsupportedError, match="float32 that 16 bits") as refused:
        quantize_to(lm, out, recipe, to="gptq")
    command = str(refused.value).rpartition("jaxq convert ")[2].split()
    assert command[2:] == ["--to", "gptq", "--requantize"]
    done = convert(*command[:2], "gptq", requantize=True)
    assert done.counts()["requantized"] == 21
    assert load_model(out).codec == "gptq"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "group", "to"),
    [("w4a16-awq", 32, "awq"), ("w8a8-smoothquant", None, "compressed-tensors")],
)
def test_input_scales_are_folded_layer_by_layer(model, tmp_path, recipe, group, to):
    """Into scales of 16 bits, too, which rounds them; as all at once in memory."""
    quantize_to(
        load_model(model, lazy=True), tmp_path / "out", recipe, TOKENS, group, to=to
    )
    small = load_model(model).quantize(recipe, TOKENS, group)
    kernel = small.params["params"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    assert kernel.input_scale is not None
    convert(small, tmp_path / "whole", to)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "gptq", "gguf"])
def test_kill_9_at_any_moment_and_resume(model, tmp_path, to):
    """The command itself, killed at random moments until it is through."""
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    spec = QuantSpec("int8", 32, scale="float16") if to == "gguf" else SPEC
    Recipe("mine", (*RECIPE.rules[:2], Rule("*", spec, solver=gptq()))).dump(recipe)
    text.write_text(TEXT * 3)
    command = [sys.executable, "-m", "jaxq", "quantize", str(model), "--json"]
    command += ["--recipe", str(recipe), "--calibration", str(text), "--to", to]
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
