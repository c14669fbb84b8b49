"""The README: its code runs as written, its commands too, its table is true."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from jaxq.cli import app
from jaxq.plan import plan
from jaxq.presets import PRESETS
from tests.tiny_lm import TEXT, write_tiny

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in, and a tiny model in the place of the embedded one."""
    changes = {"dtype": "bfloat16", "max_position_embeddings": 128}
    folder = write_tiny(tmp_path / "demo_model", **changes)
    (folder / "eval.txt").write_text(TEXT)
    (folder / "calibration.txt").write_text(TEXT * 2)
    monkeypatch.setattr("jaxq.lm.DEMO_FOLDER", folder)
    monkeypatch.setattr("jaxq.cli.options.DEMO_FOLDER", folder)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_runs_as_written(index):
    code = compile(blocks("python")[index], f"README.md, block {index}", "exec")
    exec(code, {"__name__": "readme"})


@pytest.mark.usefixtures("elsewhere")
def test_commands_run_as_written():
    script = next(block for block in blocks("sh") if "jaxq quantize" in block)
    for line in script.strip().splitlines():
        words = re.findall(r'"[^"]*"|\S+', line.partition("#")[0])
        program, *arguments = [word.strip('"') for word in words]
        assert program == "jaxq"
        ran = CliRunner().invoke(app, arguments)
        assert ran.exit_code == 0, (line, ran.output)


def test_the_table_of_presets():
    rows = re.findall(r"(?m)^\| `([\w-]+)` \|.*\| ([\d.]+) \|$", README)
    assert [name for name, _ in rows] == list(PRESETS)
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    for name, bits in rows:
        planned = plan(lambda p, x: x @ p["w"], params, name, x)
        digits = len(bits.partition(".")[2])
        assert round(planned.bits_per_weight, digits) == float(bits), name
