"""What goes wrong is said in a line or two, with the right exit code."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from jaxq.checkpoints import saving


def one_message(ran, code):
    """The message of a command that failed as it should."""
    assert ran.exit_code == code, ran.output
    assert "Traceback" not in ran.output
    assert not ran.stdout
    return " ".join(ran.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--recipe", "w4a61", "did you mean 'w4a16'?"),
        ("--recipe", "none.yaml", "there is no file none.yaml"),
        ("--to", "ggml", "no format 'ggml'; known are safetensors, orbax, jaxq"),
        ("--group-size", "0", "equal to 1"),
    ],
)
def test_quantize_options(jaxq, tiny, tmp_path, option, value, said):
    arguments = ["quantize", tiny, "-o", tmp_path / "out", "--recipe", "w8a16"]
    message = one_message(jaxq(*arguments, option, value), 2)
    assert said in message
    assert not (tmp_path / "out").exists()


def test_a_broken_recipe_file(jaxq, tiny, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nrules: [{match: '*', weight: {format: int44}}]")
    ran = jaxq("quantize", tiny, "-o", tmp_path / "out", "--recipe", path)
    message = one_message(ran, 2)
    assert "int44" in message
    assert "did you mean 'int4'" in message


def test_a_rule_that_matches_nothing(jaxq, tiny, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"rules": [{"match": "*nope*", "weight": {"format": "int8"}}]})
    )
    ran = jaxq("plan", tiny, "--recipe", path)
    assert "rule '*nope*'" in one_message(ran, 1)


def test_groups_asked_of_a_recipe_without(jaxq, tiny):
    ran = jaxq("plan", tiny, "--recipe", "w8a16", "--group-size", 64)
    assert "no rule of recipe 'w8a16' has groups" in one_message(ran, 1)


@pytest.mark.parametrize("command", [["eval", "--text", "demo"], ["inspect"]])
def test_no_such_model(jaxq, tmp_path, command):
    name, *rest = command
    message = one_message(jaxq(name, tmp_path / "nowhere", *rest), 1)
    assert message.startswith("error: ")
    assert "nowhere is no folder" in message


def test_texts(jaxq, tiny, tmp_path):
    missing = jaxq("eval", tiny, "--text", tmp_path / "no.txt")
    assert "no.txt is no file" in one_message(missing, 1)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9 au lait".encode("latin-1"))
    assert "no UTF-8 text (at byte 3)" in one_message(
        jaxq("eval", tiny, "--text", latin), 1
    )
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "0 token(s)" in one_message(jaxq("eval", tiny, "--text", empty), 1)


def test_a_reference_with_other_tokens(jaxq, tiny, text, tmp_path):
    from tests.tiny_lm import write_tiny

    other = write_tiny(tmp_path / "other", vocab_size=300)
    ran = jaxq("eval", tiny, "--text", text, "--reference", other)
    assert "the reference 300" in one_message(ran, 1)


def test_quantizing_twice(jaxq, small, tmp_path):
    folder, _ = small
    ran = jaxq("quantize", folder, "-o", tmp_path / "out", "--recipe", "w8a16")
    assert "already" in one_message(ran, 1)


def test_plan_for_a_device_is_not_there_yet(jaxq, tiny):
    ran = jaxq("plan", tiny, "--recipe", "nf4", "--target", "v5e-8")
    assert "'v5e-8' is not there yet" in one_message(ran, 2)


def test_a_prompt_beyond_the_context(jaxq, tiny):
    ran = jaxq("generate", tiny, "--prompt", "x" * 60)
    assert "context of 64" in one_message(ran, 1)


def test_a_full_disk_leaves_what_can_be_resumed(jaxq, tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ["quantize", tiny, "-o", tmp_path / "out", "--recipe", "w8a16"]
    with monkeypatch.context() as patch:
        patch.setattr(saving.manifest, "write", full)
        message = one_message(jaxq(*words), 1)
    assert "No space left on device" in message
    assert "make room" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    again = jaxq(*words, "--resume")
    assert again.exit_code == 0, again.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bug_is_called_one_and_debug_shows_it(jaxq, tiny, monkeypatch):
    def broken(*_, **__):
        raise KeyError("surprise")

    monkeypatch.setattr("jaxq.cli.inspect.load_model", broken)
    message = one_message(jaxq("inspect", tiny), 1)
    assert "unexpected KeyError: 'surprise'" in message
    assert "--debug" in message
    shown = jaxq("inspect", tiny, "--debug")
    assert isinstance(shown.exception, KeyError)


def test_ctrl_c_leaves_nothing_under_the_name(tiny, tmp_path):
    """The signal arrives while the weights are being written."""
    code = (
        "import os, signal, sys\n"
        "from jaxq.checkpoints import saving\n"
        "from jaxq.cli import main\n"
        "saving.manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['jaxq', *sys.argv[1:]]\n"
        "main()\n"
    )
    arguments = [
        "quantize",
        str(tiny),
        "-o",
        str(tmp_path / "out"),
        "--recipe",
        "w8a16",
    ]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert run.returncode == 128 + signal.SIGINT
    assert "interrupted" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
