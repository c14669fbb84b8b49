"""Kernels compiled for chips that are not here: what a step costs, and the roof.

Nothing is run and no time is measured: the compilers' own schedules and machine code
are counted. Each half needs its compiler (extra `aot`).
"""

import importlib
import importlib.util

from benchmarks.report import Table, arguments, publish

# compiler -> module with `ABOUT` and `tables()`
PARTS = {
    "libtpu": "benchmarks.tpu_schedules",
    "jax_plugins.xla_cuda13": "benchmarks.gpu_schedules",
}


def present(name: str) -> bool:
    """Whether a (perhaps nested) module is installed."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    """Print the tables of every compiler that is installed."""
    options = arguments(__doc__).parse_args()
    tables: list[Table] = []
    about: list[str] = []
    for compiler, module in PARTS.items():
        if not (present(compiler) and present(module)):
            print(f"{compiler} or {module} is not installed: its part is left out")
            continue
        part = importlib.import_module(module)
        about.append(part.ABOUT)
        tables += part.tables()
    if not tables:
        raise SystemExit("no compiler is installed: pip install 'jaxq[aot]'")
    publish("compile_report", "\n\n".join(about), tables, options)


if __name__ == "__main__":
    main()
