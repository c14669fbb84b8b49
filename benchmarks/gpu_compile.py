"""Compile for NVIDIA GPUs that are not here, and read the machine code.

The CUDA plugin compiles without a driver when it is told which GPU to compile for; what
it returns holds the very cubins that would run. Disassembled, they say how many
registers a kernel takes, whether it spills any, and how many instructions its innermost
loop issues per weight: for a product with few rows that, or the memory, is the limit.
Needs `jax-cuda13-plugin`, `jax-cuda13-pjrt` and `nvidia-cuda-nvdisasm` (extra `aot`).
Nothing here is a measurement of time.
"""

import collections
import contextlib
import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, as public data sheets and `deviceQuery` describe it.

    Attributes:
        name: as its driver says it.
        capability: compute capability.
        processors: how many.
        shared: bytes of shared memory per processor, and per thread block.
        bandwidth: of the memory, bytes per second.
        cache: bytes of the second level.
        clock: GHz.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared: tuple[int, int]
    bandwidth: int
    cache: int
    clock: float
    memory: int

    @property
    def generation(self) -> str:
        """``"sm_90"`` ..."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def describe(self) -> str:
        """Return the text proto that the compiler takes for a device."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared[0]}
  shared_memory_per_block_optin: {self.shared[1]}
  core_count: {self.processors}  fpus_per_core: 128  clock_rate_ghz: {self.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}  l2_cache_size: {self.cache}
  device_memory_size: {self.memory}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


HOPPER = (233472, 232448)
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, HOPPER, 3352320000000,
                52428800, 1.98, 84929347584),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, HOPPER, 4916000000000,
                62914560, 1.98, 150754820096),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, (167936, 166912), 2039000000000,
                41943040, 1.41, 84987740160),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, (102400, 101376), 300096000000,
              50331648, 2.04, 23580639232),
}  # fmt: skip


def mesh(gpu: str, count: int = 1) -> Mesh:
    """Return a mesh of GPUs that need not exist, its axis called ``"x"``."""
    try:
        found = topologies.get_topology_desc(
            "",
            platform="cuda",
            target_config=GPUS[gpu].describe(),
            topology=f"1x1x{count}",
        )
    except Exception as error:
        raise RuntimeError(
            "there is no CUDA compiler here: pip install 'jaxq[aot]', and set "
            "JAX_PLATFORMS=cpu"
        ) from error
    return Mesh(np.array(found.devices), ("x",))


def compiled(fn: Callable[..., Any], shapes: Sequence[Any], gpu: str = "h200") -> Any:
    """Compile ``fn`` for one GPU.

    Args:
        fn: of trees of arrays.
        shapes: trees of `jax.ShapeDtypeStruct`, one per argument.
        gpu: a key of `GPUS`.
    """
    devices = mesh(gpu)
    sharding = NamedSharding(devices, PartitionSpec())
    whole = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
    )
    return lowered(fn, whole, devices, gpu).compile()


def lowered(
    fn: Callable[..., Any], shapes: Sequence[Any], devices: Mesh, gpu: str
) -> Any:
    """Lower ``fn`` of shapes with shardings for the GPUs of a mesh."""
    with (
        _assumed_capability(GPUS[gpu].capability),
        jax.sharding.use_abstract_mesh(devices.abstract_mesh),
    ):
        trace = jax.jit(fn).trace(*shapes)
        return trace.lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def _assumed_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Let Mosaic GPU compile for this capability: with no device it takes sm_90."""
    from jax.experimental.mosaic.gpu import utils

    known = getattr(utils, "_infer_arch", None)
    if known is None:  # jax 0.10 knows no other
        yield
        return
    utils._infer_arch = lambda: capability
    try:
        yield
    finally:
        utils._infer_arch = known


# ------------------------------------------------------------------- machine code


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: per thread.
        spills: instructions that load or store registers' overflow.
        loop: instructions of the innermost loop that multiplies, by name.
        whole: all instructions, by name.
    """

    registers: int
    spills: int
    loop: collections.Counter[str]
    whole: collections.Counter[str]

    @property
    def per_step(self) -> int:
        """Instructions that a thread issues per turn of the loop."""
        return sum(self.loop.values())


MULTIPLIES = r"(HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA)"


def code(executable: Any, marker: str = MULTIPLIES) -> Code:
    """Return the machine code of the kernel with most instructions of a kind.

    Raises:
        ValueError: when no kernel has any.
    """
    texts = [(cubin, disassembled(cubin)) for cubin in cubins(executable)]
    if not texts:
        raise ValueError("the executable holds no cubin")
    cubin, text = max(texts, key=lambda both: len(re.findall(marker, both[1])))
    if not re.search(marker, text):
        raise ValueError(f"no kernel has an instruction that matches {marker!r}")
    whole = _count(text)
    spills = whole["LDL"] + whole["STL"]
    registers = _attribute(cubin, REGISTERS)
    return Code(registers, spills, _count(_loop(text, marker)), whole)


def _count(text: str) -> collections.Counter[str]:
    pattern = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)"
    return collections.Counter(re.findall(pattern, text, re.M))


def _loop(text: str, marker: str) -> str:
    """Return the shortest loop with such an instruction."""
    lines, labels, best = text.split("\n"), {}, ""
    for i, line in enumerate(lines):
        if found := re.match(r"^(\.L_x_\d+):", line):
            labels[found[1]] = i
    for i, line in enumerate(lines):
        jump = re.search(r"BRA(?:\.\w+)*\s+.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], len(lines)) < i:
            body = "\n".join(lines[labels[jump[1]] : i + 1])
            if re.search(marker, body) and (not best or len(body) < len(best)):
                best = body
    return best


def disassembled(cubin: bytes) -> str:
    """Return the text that nvdisasm prints."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_nvdisasm(), "-c", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.stdout if run.returncode == 0 else ""  # bytes that look like a cubin


def _nvdisasm() -> str:
    wheel = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/nvdisasm")
    found = shutil.which("nvdisasm") or next(map(str, wheel), None)
    if found is None:
        raise RuntimeError("nvdisasm is not installed: pip install 'jaxq[aot]'")
    return found


# ------------------------------------------------- cubins in a serialized executable

REGISTERS = 0x2F
_ELF, _CUDA = b"\x7fELF\x02\x01", 190
_RIEGELI = bytes.fromhex("83af70d10d884a3f")
_LEAST = 2000  # bytes of anything worth unpacking


def cubins(executable: Any) -> list[bytes]:
    """Return the cubins in a compiled function, of Pallas kernels and XLA's own."""
    found: list[bytes] = []
    for payload in _payloads(executable.runtime_executable().serialize()):
        found += [cubin for cubin in _complete(payload) if cubin not in found]
    return found


def _complete(payload: bytes) -> list[bytes]:
    """Return the cubins that lie whole in some bytes."""
    found, start = [], -1
    while (start := payload.find(_ELF, start + 1)) >= 0:
        elf = payload[start:]
        if len(elf) > 64 and struct.unpack_from("<H", elf, 18)[0] == _CUDA:
            with contextlib.suppress(struct.error):
                size = _elf_size(elf)
                if size <= len(elf):
                    found.append(elf[:size])
    return found


def _sections(elf: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the type, offset and size of every section."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    for i in range(count):
        at = start + i * size
        (kind,) = struct.unpack_from("<I", elf, at + 4)
        yield kind, *struct.unpack_from("<QQ", elf, at + 0x18)


def _elf_size(elf: bytes) -> int:
    programs, sections = struct.unpack_from("<QQ", elf, 0x20)
    each, count, size, number = struct.unpack_from("<HHHH", elf, 0x36)
    ends = [offset + n for kind, offset, n in _sections(elf) if kind != 8]
    return max(programs + each * count, sections + size * number, *ends)


def _attribute(elf: bytes, number: int) -> int:
    """Return the largest value of an attribute of its kernels (section .nv.info).

    An entry is a format, the attribute, a length of 8, the kernel's symbol, the value.
    """
    head, values, at = bytes([4, number, 8, 0]), [0], -1
    while (at := elf.find(head, at + 1)) >= 0:
        values.append(struct.unpack_from("<I", elf, at + 8)[0])
    return max(value for value in values if value < 1 << 16)


def _payloads(data: bytes) -> Iterator[bytes]:
    """Yield what is inside: riegeli files, and chunks compressed with snappy."""
    at = data.find(_RIEGELI)
    if at >= 0:
        # every block of 64 KiB begins with a header of 24 bytes
        body = data[at:]
        blocks = [body[i + 24 : i + 65536] for i in range(0, len(body), 65536)]
        data = b"".join(blocks)
        inner = data.find(_RIEGELI)
        if inner >= 0:
            yield from _payloads(data[inner:])
    yield data
    at = 0
    while at < len(data) - 16:
        if _stream(data, at) is None:
            at += 1
            continue
        # a few bytes before the true stream one may seem to begin, that soon ends
        near = [_stream(data, at + i) for i in range(128)]
        inside, at = max((s for s in near if s is not None), key=lambda s: s[1])
        yield from _payloads(inside)


def _stream(data: bytes, at: int) -> tuple[bytes, int] | None:
    """Return what a compressed stream that begins here holds, and its end.

    None where none begins, or none with a cubin or another file in it.
    """
    found = _snappy(data, at)
    if found is None or not (_RIEGELI in found[0] or _complete(found[0])):
        return None
    return found


def _snappy(data: bytes, at: int) -> tuple[bytes, int] | None:
    """Return what a snappy stream decodes to, and its end; None where none begins."""
    size, at = _varint(data, at)
    if size < _LEAST:
        return None
    out = bytearray()
    while len(out) < size and at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                extra = length - 59
                length = int.from_bytes(data[at : at + extra], "little")
                at += extra
            out += data[at : at + length + 1]
            at += length + 1
            continue
        length, back, at = _copy(data, at, tag)
        if not 0 < back <= len(out):
            return None
        for start in range(0, length, back):
            out += out[-back:][: min(back, length - start)]
    return (bytes(out), at) if len(out) == size else None


def _copy(data: bytes, at: int, tag: int) -> tuple[int, int, int]:
    """Return the length and distance of a repetition, and where it ends."""
    if tag & 3 == 1:
        low = data[at] if at < len(data) else 0
        return 4 + (tag >> 2 & 7), (tag >> 5) << 8 | low, at + 1
    width = 2 if tag & 3 == 2 else 4
    return 1 + (tag >> 2), int.from_bytes(data[at : at + width], "little"), at + width


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of at most five bytes and its end; 0 when there is none."""
    number = 0
    for place in range(5):
        if at + place >= len(data):
            return 0, at
        byte = data[at + place]
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    return 0, at
