"""The generations of chips: how devices are recognised, and that all have kernels."""

import pytest

from benchmarks.gpu_compile import GPUS
from pallas_kernels import table
from pallas_kernels.target import GENERATIONS, generation, generations


@pytest.mark.parametrize(
    ("backend", "kind", "capability", "expected"),
    [
        ("tpu", "TPU v5", None, "v5p"),
        ("tpu", "TPU v5 lite", None, "v5e"),
        ("tpu", "TPU v6 lite", None, "v6e"),
        ("tpu", "TPU7x", None, "v7x"),
        ("tpu", "TPU v4", None, ""),
        ("gpu", "NVIDIA A10", None, "sm_86"),
        ("gpu", "NVIDIA GeForce RTX 4090", None, "sm_89"),
        ("gpu", "NVIDIA B200", None, ""),
        ("gpu", "whatever it is called", "9.0", "sm_90"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "12.1", "sm_121"),
        ("cpu", "cpu", None, ""),
        *(("gpu", chip.name, None, chip.generation) for chip in GPUS.values()),
    ],
)
def test_devices_are_recognised(backend, kind, capability, expected):
    assert generation(backend, kind, capability) == expected


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation_has_kernels_of_its_compiler_first(name):
    chip = GENERATIONS[name]
    mine = [k for k in table.kernels(chip.backend) if name in k.generations]
    assert len(mine) >= 2
    for kernel in mine[:2]:
        assert ("triton" in kernel.name) == (chip.compiler == "triton")
    assert all(any(row.fits(name, 1) for row in k.tiles) for k in mine)


def test_generations_of_a_compiler_are_all_there_is():
    both = generations("gpu", "mosaic") + generations("gpu", "triton")
    assert sorted(both) == sorted(generations("gpu"))
    assert set(generations("gpu")) | set(generations("tpu")) == set(GENERATIONS)
