"""Memory that was freed does not stay with the process."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jaxq.pipeline.heap import give_back


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
