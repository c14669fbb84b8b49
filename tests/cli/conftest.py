"""A tiny model, and the command line to run on it."""

import pytest
from typer.testing import CliRunner

from jaxq.cli import app
from tests.tiny_lm import TEXT, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a float model."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file to evaluate on."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def jaxq():
    """Run `jaxq ARGUMENTS`; returns exit code, stdout and stderr."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def small(tiny, tmp_path_factory):
    """The folder and the JSON that `jaxq quantize` made of the tiny model."""
    out = tmp_path_factory.mktemp("small") / "small"
    arguments = ["quantize", tiny, "-o", out, "--recipe", "w8a16", "--json"]
    ran = CliRunner().invoke(app, [str(a) for a in arguments])
    assert ran.exit_code == 0, ran.stderr
    return out, ran.stdout
