"""`--cache`: what keys and values are kept as."""

import json

from jaxq.lm import load_model


def test_generate_writes_with_a_small_cache(jaxq, tiny):
    ran = jaxq("generate", tiny, "--prompt", "import os", "-n", 5, "--cache", "int8")
    assert ran.exit_code == 0, ran.stderr
    text = load_model(tiny).generate("import os", 5, cache="int8")
    assert ran.stdout == f"import os{text}\n"


def test_eval_reads_through_the_cache(jaxq, tiny, text):
    kl = []
    for name in ("float", "int8", "int4"):
        arguments = ("eval", tiny, "--text", text, "--reference", tiny, "--json")
        ran = jaxq(*arguments, "--limit", 2, "--cache", name)
        assert ran.exit_code == 0, ran.stderr
        kl.append(json.loads(ran.stdout)["kl"])
    assert kl[0] < 1e-6 < kl[1] < kl[2]


def test_another_name_is_answered_with_those_there_are(jaxq, tiny):
    ran = jaxq("generate", tiny, "--prompt", "a", "--cache", "int9")
    assert ran.exit_code == 2
    assert "'int9'" in ran.stderr
    assert "float, int4, int8" in " ".join(ran.stderr.replace("│", " ").split())
