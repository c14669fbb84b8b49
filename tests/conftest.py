"""What every test stands on: eight CPU devices, strict promotion, fixed seeds."""

import os
import signal
from collections.abc import Iterator
from importlib.metadata import version

# Read once, when JAX first looks for devices: must precede the import of jax.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
if os.environ.get("JAXQ_TEST_GPU") != "1":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest
from hypothesis import settings

# The `-m` of pyproject.toml.
PLAIN = "not torch and not compare and not gpu and not slow and not aot"

jax.config.update("jax_numpy_dtype_promotion", "strict")

# A run in the background of a shell ignores Ctrl-C, and so would the programs that the
# tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine; a slow shared core is not a failure.
settings.register_profile("jaxq", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("jaxq")


def pytest_configure(config: pytest.Config) -> None:
    """Compile quickly in the plain suite, where compiling is most of the time.

    The tests with marks compile as users do, and so does everything under
    ``JAXQ_TEST_OPTIMIZED=1``: some of them read what the compiler made.
    """
    marked = config.option.markexpr != PLAIN
    if marked or os.environ.get("JAXQ_TEST_OPTIMIZED") == "1":
        return
    flags = ["--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):
        # Later releases have no other emitters, and a flag that XLA does not know
        # ends the process.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] += f" {' '.join(flags)}"


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled() -> Iterator[None]:
    """Free a module's compiled functions when its last test has run.

    Each holds about eight memory mappings, and Linux allows a process 65,530: past them
    the compiler crashes. Only a suite of thousands of functions gets there.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    """A JAX random key, the same in every run."""
    return jax.random.key(0)
