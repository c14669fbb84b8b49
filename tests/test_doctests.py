"""Every example in a docstring runs, under the test configuration."""

import doctest
import importlib
import pkgutil

import pytest

import jaxq
import pallas_kernels

# The command line and what it draws with are tested through their own modules.
PACKAGES = (jaxq, pallas_kernels)


def module_names():
    for package in PACKAGES:
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                yield module.name


def with_examples(name):
    """The docstrings of a module that hold examples."""
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", sorted(set(module_names())))
def test_examples_run(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    for test in with_examples(name):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out


def test_there_are_examples():
    """The search above finds what it should."""
    for name in ("jaxq.spec", "jaxq.quantize", "pallas_kernels.layouts"):
        assert with_examples(name), name
