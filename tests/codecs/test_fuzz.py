"""Thousands of damaged headers and configs: clean errors, no hang, little memory."""

import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.safetensors import read_header
from jaxq.codecs.gguf import GGUFReader, open_gguf
from jaxq.codecs.reading import find_config
from jaxq.codecs.source import SafetensorsSource
from jaxq.codecs.table import codec_of
from tests.codecs.excerpts import DATA, NAMES, load

HEADERS, CONFIGS, GGUFS = 30, 60, 600  # of each excerpt, of each, in all
SECONDS, MEGABYTES = 5, 200
MODEL = DATA.parent / "models" / "gguf-q4_0" / "model.gguf"

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**30, 0.5, 1e300, -0.0),
    *("", "x", "gptq", "int", "float", "F8_E4M3", "I32", "re:(", "(a+)+$", "re:.*"),
    *([], [1], [-1, 128], [2**40, 2**40], ["re:(x*)*"], {}, {"a": {}}, [[[]]]),
)


def test_there_are_enough_inputs():
    assert len(NAMES) * (HEADERS + CONFIGS) + GGUFS >= 2000


@pytest.fixture(autouse=True)
def frugal():
    """No input may take long (of this process, whatever else runs) or much memory."""
    before, start = _peak(), time.process_time()
    with np.errstate(all="ignore"):
        yield
    assert time.process_time() - start < SECONDS * 6
    assert _peak() - before < MEGABYTES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_headers(tmp_path, name):
    rng = np.random.default_rng(abs(hash_of(name)))
    excerpt = load(name)
    original = (DATA / f"{name}.safetensors").read_bytes()
    path, clean = tmp_path / "model.safetensors", 0
    for _ in range(HEADERS):
        path.write_bytes(damage_file(rng, original))
        clean += survives(lambda: read_all(path, excerpt.config, excerpt.weights))
    assert clean < HEADERS, "no mutation did any harm: the test tests nothing"


@pytest.mark.parametrize("name", NAMES)
def test_damaged_configs(name):
    rng = np.random.default_rng(abs(hash_of(name)) + 1)
    excerpt = load(name)
    path = DATA / f"{name}.safetensors"
    for _ in range(CONFIGS):
        config = damage(rng, excerpt.config or {"quant_method": "hqq"})
        survives(lambda config=config: read_all(path, config, excerpt.weights))


def test_damaged_gguf_files(tmp_path):
    rng = np.random.default_rng(7)
    original, path, clean = MODEL.read_bytes(), tmp_path / "model.gguf", 0
    for _ in range(GGUFS):
        path.write_bytes(damage_bytes(rng, original, 1500))
        clean += survives(lambda: read_gguf(path))
    assert clean < GGUFS


def read_all(path: Path, config: Any, weights: Any) -> None:
    """Read every weight of a file, as loading a model would."""
    header = read_header(path)
    source = SafetensorsSource(dict.fromkeys(header.entries, header))
    found = find_config(path.parent / "nowhere", {"quantization_config": config})
    found = found or {"quant_method": "hqq"}
    reader = codec_of(found).read(found, source)
    reader.unused()
    for name, about in weights.items():
        module = name.removesuffix(".weight")
        if reader.parts(module):
            reader.read(module, tuple(about["shape"]))


def read_gguf(path: Path) -> None:
    """Read every tensor of a file."""
    source, _ = open_gguf(path)
    reader = GGUFReader(source)
    for name in source:
        module = name.removesuffix(".weight")
        if reader.parts(module):
            reader.read(module, source.entry(name)[1])
        else:
            source.read(name)


def survives(read: Any) -> bool:
    """Whether a damaged input is read all the same; else the error must be clean."""
    start = time.process_time()
    try:
        read()
    except CheckpointError:
        return False
    finally:
        assert time.process_time() - start < SECONDS
    return True


def damage_file(rng: np.random.Generator, data: bytes) -> bytes:
    """Return a safetensors file with something wrong in it."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return damage_bytes(rng, data, 8 + length)
    header = json.loads(data[8 : 8 + length])
    tensors = [name for name in header if name != "__metadata__"]
    name = str(rng.choice(tensors))
    if rng.random() < 0.2:
        header[str(rng.choice([*tensors, "other"]))] = header.pop(name)
    else:
        header[name] = damage(rng, header[name])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def damage_bytes(rng: np.random.Generator, data: bytes, region: int) -> bytes:
    """Return bytes that are cut, added to, or changed in the first ``region``."""
    out = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(out[: rng.integers(len(out))])
    if kind == 1:
        return bytes(out) + bytes(int(rng.integers(1, 100)))
    for _ in range(int(rng.integers(1, 6))):
        out[int(rng.integers(region))] = int(rng.integers(256))
    return bytes(out)


def damage(rng: np.random.Generator, value: Any) -> Any:
    """Return JSON with one value, somewhere, that is missing or another."""
    out = copy.deepcopy(value)
    spots = list(_spots(out))
    if not spots:
        return _odd(rng)
    holder, key = spots[int(rng.integers(len(spots)))]
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = _odd(rng)
    return out


def hash_of(text: str) -> int:
    """Return the same number for a text in every process."""
    return int.from_bytes(text.encode()[-6:], "little")


def _odd(rng: np.random.Generator) -> Any:
    return copy.deepcopy(ODD[int(rng.integers(len(ODD)))])


def _spots(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _spots(inner)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
