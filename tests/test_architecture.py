"""The house rules that a machine can check: floors, lean imports, public names only."""

import ast
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxq", "pallas_kernels")
# The one place that may look behind JAX's public names, to compare with what it hides.
PRIVATE_JAX_HELPER = ROOT / "tests" / "private_jax.py"
HEAVY = ("torch", "transformers", "flax", "orbax", "rich", "typer", "tokenizers")


def _sources(*folders: str) -> list[Path]:
    return [
        path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports or reads off `jax`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def private_jax_uses(source: str) -> list[int]:
    """Lines of `source` that reach into `jax._src`."""
    names = _imports(ast.parse(source))
    return sorted({line for line, name in names if name.startswith("jax._src")})


def root_imports(source: str) -> list[int]:
    """Lines of `source` that import from the package's own front door."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if any(alias.name == "jaxq" for alias in node.names):
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxq":
            submodules = (_is_module(alias.name) for alias in node.names)
            if not all(submodules):
                lines.append(node.lineno)
    return lines


def _is_module(name: str) -> bool:
    package = ROOT / "jaxq" / name
    return package.is_dir() or package.with_suffix(".py").is_file()


def test_import_rules():
    """The contracts of pyproject.toml: layers, forbidden and independent imports."""
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as f; f()",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_private_jax():
    paths = _sources("jaxq", "pallas_kernels", "tests", "benchmarks", "examples")
    found = {
        _name(path): lines
        for path in paths
        if path != PRIVATE_JAX_HELPER and (lines := private_jax_uses(path.read_text()))
    }
    assert not found


def test_checkers_see_a_planted_offence():
    """The two checks above are not vacuous."""
    assert private_jax_uses("from jax._src import core") == [1]
    assert private_jax_uses("import jax\nx = jax._src.core.Jaxpr") == [2]
    assert private_jax_uses("import jax\nx = jax.extend.core.Jaxpr") == []
    assert root_imports("from jaxq import QuantSpec") == [1]
    assert root_imports("import jaxq") == [1]


def test_modules_do_not_import_through_the_front_door():
    """`from jaxq import QuantSpec` inside jaxq hides the floor the name lives on."""
    doors = {ROOT / "jaxq" / "__init__.py", ROOT / "jaxq" / "__main__.py"}
    found = {
        _name(path): lines
        for path in _sources("jaxq")
        if path not in doors and (lines := root_imports(path.read_text()))
    }
    assert not found


def test_no_drawer_of_odds_and_ends():
    """A file is one idea, named after it."""
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [_name(path) for path in _sources(*PACKAGES) if path.name in drawers]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_lean(package):
    """Importing the package loads no framework, command line or other library."""
    code = f"import sys, {package}; print(*sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert package in loaded
    assert not loaded.intersection(HEAVY)


def test_every_public_name_is_documented():
    import jaxq

    undocumented = [
        name
        for name, value in vars(jaxq).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (inspect.isclass(value) or callable(value))
        and not inspect.getdoc(value)
    ]
    assert not undocumented


def test_typed():
    """Both packages tell type checkers that their hints are meant."""
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()
