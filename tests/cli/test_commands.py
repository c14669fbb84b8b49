"""Every command on a tiny model: what it prints, what it writes."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxq.cli.screen import print_json, size
from jaxq.evaluate import evaluate_text
from jaxq.lm import load_model
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from jaxq.streaming import quantize_to
from tests.tiny_lm import TEXT, write_tiny

COMMANDS = [
    "demo",
    "quantize",
    "eval",
    "generate",
    "plan",
    "inspect",
    "compare",
    "convert",
]


def test_help_teaches(jaxq):
    shown = jaxq("--help")
    assert shown.exit_code == 0
    for name in [*COMMANDS, "Exit codes", "jaxq eval small --text demo"]:
        assert name in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(jaxq, command):
    shown = jaxq(command, "--help")
    assert shown.exit_code == 0
    assert "Examples" in shown.stdout
    assert re.search(rf"(?m)^\s*jaxq {command} ", shown.stdout)


def test_quantize_writes_a_model_and_says_what_it_is(small, tiny):
    folder, printed = small
    facts = json.loads(printed)
    lm = load_model(folder)
    assert set(facts) >= {"recipe", "output", "bits_per_weight", "bytes", "seconds"}
    assert facts["recipe"] == "w8a16"
    assert facts["output"] == str(folder)
    assert facts["bits_per_weight"] == lm.bits_per_weight
    assert facts["bytes"] == lm.nbytes < facts["bytes_before"]
    np.testing.assert_array_equal(
        lm.params["params"]["norm"]["weight"],
        load_model(tiny).params["params"]["norm"]["weight"],
    )


def test_quantize_reads_a_recipe_file(jaxq, tiny, tmp_path):
    spec = QuantSpec("int5", 32, scale="bfloat16")
    Recipe("mine", (Rule("*mlp*", spec),)).dump(tmp_path / "mine.yaml")
    ran = jaxq(
        "quantize", tiny, "-o", tmp_path / "out", "--recipe", tmp_path / "mine.yaml",
        "--group-size", 16, "--to", "orbax",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    lm = load_model(tmp_path / "out")
    layer = lm.params["params"]["layers_0"]
    assert layer["mlp"]["up_proj"]["kernel"].spec.block == 16
    assert lm.recipe.name == "mine-g16"
    for said in ("mine-g16", "smaller", "orbax"):
        assert said in ran.stdout


def test_quantize_keeps_what_is_there_unless_forced(jaxq, small, tiny):
    folder, _ = small
    before = (folder / "jaxq.json").read_bytes()
    again = ("quantize", tiny, "-o", folder, "--recipe", "w8a16")
    refused = jaxq(*again)
    assert refused.exit_code == 1
    assert "exists" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (folder / "jaxq.json").read_bytes() == before
    assert jaxq(*again, "--force").exit_code == 0


def test_eval_has_the_keys_that_scripts_read(jaxq, small, tiny, text):
    folder, _ = small
    ran = jaxq("eval", folder, "--text", text, "--reference", tiny, "--json")
    assert ran.exit_code == 0, ran.stderr
    facts = json.loads(ran.stdout)
    lm, whole = load_model(folder), load_model(tiny)
    exact = evaluate_text(lm, TEXT, whole)
    for key in ("perplexity", "kl", "top1"):
        np.testing.assert_allclose(facts[key], getattr(exact, key), rtol=1e-5)
    assert facts["tokens"] == exact.tokens
    assert facts["bits_per_weight"] == lm.bits_per_weight


def test_eval_without_a_reference(jaxq, tiny, text):
    ran = jaxq("eval", tiny, "--text", text, "--window", 32, "--limit", 2, "--json")
    facts = json.loads(ran.stdout)
    assert facts["kl"] is facts["top1"] is None
    assert facts["tokens"] == 2 * 31
    table = jaxq("eval", tiny, "--text", text, "--window", 32, "--limit", 2)
    assert f"{facts['perplexity']:.4f}" in table.stdout


def test_generate_prints_the_prompt_and_what_follows(jaxq, tiny):
    ran = jaxq("generate", tiny, "--prompt", "import [os]", "-n", 5)
    assert ran.exit_code == 0, ran.stderr
    text = load_model(tiny).generate("import [os]", 5)
    assert ran.stdout == f"import [os]{text}\n"


def test_plan_is_what_quantize_does(jaxq, tiny):
    ran = jaxq("plan", tiny, "--recipe", "w4a16", "--json")
    facts = json.loads(ran.stdout)
    rows = {row["path"]: row for row in facts["parameters"]}
    up = rows["params/layers_1/mlp/up_proj/kernel"]
    assert up["shape"] == [64, 128]
    assert "uint4 g64" in up["decision"]
    assert rows["params/norm/weight"]["decision"] == "float"
    assert facts["bytes_after"] == load_model(tiny).quantize("w4a16").nbytes


def test_plan_merges_layers_unless_told_not_to(jaxq, tiny, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    merged = jaxq("plan", tiny, "--recipe", "w8a16").stdout
    assert "layers_*/mlp/up_proj/kernel ×2" in merged
    every = jaxq("plan", tiny, "--recipe", "w8a16", "--all").stdout
    assert "layers_1/mlp/up_proj/kernel" in every
    assert "layers_*" not in every


def test_inspect_quantized_and_float(jaxq, small, tiny, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, _ = small
    facts = json.loads(jaxq("inspect", folder, "--json").stdout)
    assert facts["bits_per_weight"] == load_model(folder).bits_per_weight
    assert facts["recipe"]["name"] == "w8a16"
    shown = jaxq("inspect", folder).stdout
    assert "params/layers_0/self_attn/q_proj/kernel" in shown
    assert "int8 channel" in shown
    whole = json.loads(jaxq("inspect", tiny, "--json").stdout)
    assert whole["bits_per_weight"] == 32
    assert whole["parameters"] == facts["parameters"]
    assert "a float model" in jaxq("inspect", tiny).stdout


def test_as_a_program(tiny, tmp_path):
    """In a process of its own: JSON alone on stdout, and a fast --version."""
    run = subprocess.run(
        [sys.executable, "-m", "jaxq", "plan", tiny, "--recipe", "nf4", "--json"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["recipe"] == "nf4"


def test_help_does_not_load_what_it_does_not_need():
    code = (
        "import sys, jaxq.cli\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    slow = {"flax", "orbax", "transformers", "torch", "tokenizers", "matplotlib"}
    assert not slow & set(run.stdout.split())


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (999, "999 bytes"),
        (1_500, "1.50 kB"),
        (10_492_416, "10.49 MB"),
        (2e12, "2.00 TB"),
    ],
)
def test_size(count, shown):
    assert size(count) == shown


def test_json_has_no_word_for_infinity(capsys):
    print_json({"a": [float("inf"), 1.5], "b": float("nan"), "c": "[x]"})
    assert json.loads(capsys.readouterr().out) == {
        "a": [None, 1.5],
        "b": None,
        "c": "[x]",
    }


def test_quantize_writes_what_other_engines_read(jaxq, tiny, tmp_path, monkeypatch):
    """And tells the same as of jaxq's own format, as do its exit codes."""
    out = tmp_path / "out"
    words = ["quantize", tiny, "-o", out, "--recipe", "nf4", "--to", "bitsandbytes"]
    ran = jaxq(*words)
    assert ran.exit_code == 0, ran.stderr
    assert "jaxq → bitsandbytes: 2 float, 5 kept, 14 exact" in ran.stderr
    weight = "params/layers_0/mlp/up_proj/kernel"

    def unlucky(*arguments, **options):
        written = quantize_to(*arguments, **options)
        row = written.evidence[weight] | {"fallback": "no data"}
        evidence = {**written.evidence, weight: row}
        return dataclasses.replace(written, evidence=evidence)

    with monkeypatch.context() as patch:
        patch.setattr("jaxq.cli.quantize.quantize_to", unlucky)
        ran = jaxq(*words, "--force", "--json")
    assert ran.exit_code == 3
    told = json.loads(ran.stdout)
    assert told["fallbacks"] == {weight: "no data"}
    assert told["format"] == "bitsandbytes"
    assert told["bytes"] == (out / "model.safetensors").stat().st_size
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert (out / "tokenizer.json").is_file()
    assert load_model(out).codec == "bitsandbytes"


def test_quantize_refuses_at_once_what_a_format_has_not(jaxq, tiny, tmp_path):
    words = ["quantize", tiny, "-o", tmp_path / "out", "--to"]
    ran = jaxq(*words, "gptq", "--recipe", "w8a16")
    assert ran.exit_code == 1
    said = "model.layers.0.mlp.down_proj.weight and 6 more: its scales are float32"
    assert said in ran.stderr
    ran = jaxq(*words, "orbax", "--recipe", "w8a16", "--resume")
    assert ran.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_convert_says_what_became_of_every_weight(jaxq, small, tmp_path):
    folder, _ = small
    ran = jaxq("convert", folder, tmp_path / "a", "--to", "compressed-tensors")
    assert ran.exit_code == 0, ran.stderr
    assert "exact" in ran.stdout
    ran = jaxq("convert", tmp_path / "a", tmp_path / "b", "--to", "fp8")
    assert ran.exit_code == 1
    assert "cannot be written as fp8" in ran.stderr
    assert "--requantize" in ran.stderr
    ran = jaxq(
        "convert", tmp_path / "a", tmp_path / "b", "--to", "fp8", "--requantize",
        "--json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["lossless"] is False
    assert facts["counts"]["requantized"] == 14
    assert all(row["error"] < 0.1 for row in facts["rows"])


def test_quantize_says_what_fell_back_and_what_saw_too_little(jaxq, tmp_path):
    """The feed-forward's activations are finite, and their squares are not."""
    folder = write_tiny(tmp_path / "broken", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"][:] = 1e19
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-19
    save_file(tensors, folder / "model.safetensors")
    short = tmp_path / "short.txt"
    short.write_text("import os\n")
    arguments = ["--recipe", "w4a16-gptq", "--calibration", short, "--json"]
    ran = jaxq("quantize", folder, "-o", tmp_path / "out", *arguments)
    assert ran.exit_code == 3, ran.output
    feed_forward = ", ".join(f"layers_0/mlp/{n}_proj" for n in ("gate", "up", "down"))
    assert "fell back: 3 weights (exit code 3)" in ran.stderr
    said = f"{feed_forward}: rounded to nearest: its Gram matrix is not finite"
    assert said in ran.stderr
    advice = "its loss says little; give more calibration data"
    told = json.loads(ran.stdout)
    counts = {f"10 tokens for {n} inputs: {advice}": k for n, k in ((64, 6), (128, 1))}
    assert {note: len(paths) for note, paths in told["notes"].items()} == counts
    assert all(f": {note}" in ran.stderr for note in counts)
    assert load_model(tmp_path / "out").fallbacks == told["fallbacks"]
    assert len(told["fallbacks"]) == 3
