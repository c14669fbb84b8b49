"""Memory that was freed does not stay with the process."""

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.heap import give_back, one_at_a_time


def resident() -> float:
    """Return this process's MiB in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_pages_between_living_arrays_go_back() -> None:
    # an array of the largest size that is kept, so that those below are kept as well
    largest = np.ones(31 * 2**17)
    del largest
    arrays = [np.ones(2**17) for _ in range(256)]  # 1 MiB each
    kept = arrays[::2]  # those between cannot be given back from the heap's end
    del arrays
    before = resident()
    give_back()
    assert before - resident() > 100
    assert all((x == 1).all() for x in kept)
    give_back()  # twice is as good as once


def test_sources_of_arrays_do_not_pile_up() -> None:
    sources = []

    def made() -> Iterator[tuple[str, object]]:
        for i in range(32):
            living = sum(source() is not None for source in sources)
            assert living <= 2, "JAX holds what it has copied until its next call"
            source = np.full(2**20, i, np.float32)
            sources.append(weakref.ref(source))
            array = jnp.asarray(source)
            del source
            yield str(i), array

    for i, (name, array) in enumerate(list(one_at_a_time(made()))):
        assert (name, float(array[-1])) == (str(i), i)
