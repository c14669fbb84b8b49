"""What every quantizer in this comparison is given, and what it gives back.

Given: a float Hugging Face folder and one array of calibration tokens. Given back: the
same folder with the linear layers of the decoder blocks replaced by the numbers that
the quantizer's own format stands for, and how long that took. Needs numpy and
safetensors (`tokenizers` to draw the tokens), so it imports in every environment.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SEQUENCES = 128
LENGTH = 512
DRAWS = (0, 1, 2)
RECORD = "run.json"

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def calibration_draw(
    tokens: np.ndarray, seed: int, sequences: int = SEQUENCES, length: int = LENGTH
) -> np.ndarray:
    """Draw windows at random offsets of a text.

    Args:
        tokens: the whole text, ``int[tokens]``.
        seed: of `numpy.random.default_rng`.
        sequences: how many windows; they may overlap.
        length: tokens in each.

    Returns:
        ``int32[sequences, length]``.
    """
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(tokens) - length + 1, sequences)
    return np.stack([tokens[i : i + length] for i in starts]).astype(np.int32)


@dataclasses.dataclass
class Clock:
    """How long a quantizer took, imports and loading aside.

    Attributes:
        seconds: on the wall.
        cpu_seconds: of all threads, which other work on the machine disturbs less.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside the ``with``."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu


def options(description: str, *choices: str) -> argparse.ArgumentParser:
    """Return the parser of every driver; the first of ``choices`` is its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE.npy")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--variant", choices=choices, default=choices[0])
    return parser


def linear_names(model: Path) -> list[str]:
    """Return the modules that are quantized, in the order they are met."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return [f"model.layers.{i}.{name}" for i in range(layers) for name in LINEARS]


def read_linears(model: Path) -> dict[str, np.ndarray]:
    """Return the float weights of `linear_names`, ``float32[out, in]``."""
    tensors = _read_float(model / "model.safetensors")
    return {name: tensors[f"{name}.weight"] for name in linear_names(model)}


def write_run(
    run: argparse.Namespace,
    weights: Mapping[str, np.ndarray],
    clock: Clock,
    package: str,
    *,
    norms: Mapping[str, np.ndarray] | None = None,
    scaled: bool = False,
    **facts: object,
) -> None:
    """Write the float folder with ``weights`` in the place of its linear layers.

    Args:
        run: the driver's parsed options.
        weights: by module name, ``[out, in]``: what the quantized layer multiplies by.
        clock: of the quantization.
        package: whose version is recorded.
        norms: by module name, the norms into which scales were folded.
        scaled: input channels of the weights carry their own scale, so that the values
            in a group cannot be counted.
        **facts: for the record: ``method``, ``symmetric``, ``note``.

    Raises:
        ValueError: when a layer is missing, has another shape, is not finite, was not
            changed by quantizing, or takes more values than its bits allow.
    """
    tensors = _read_float(run.model / "model.safetensors")
    for name, norm in (norms or {}).items():
        tensors[f"{name}.weight"] = np.ascontiguousarray(norm, np.float32)
    levels = []
    for name in linear_names(run.model):
        before = tensors[f"{name}.weight"]
        after = np.asarray(weights[name], np.float32)
        if before.shape != after.shape or not np.isfinite(after).all():
            raise ValueError(f"{name}: shape {after.shape}, or not finite")
        if np.array_equal(before, after):
            raise ValueError(f"{name} came back as it was: nothing quantized it")
        levels.append(0 if scaled else levels_per_group(after, run.group))
        tensors[f"{name}.weight"] = np.ascontiguousarray(after)
    if max(levels) > 2**run.bits:
        raise ValueError(f"a group takes {max(levels)} values, at {run.bits} bits")
    run.out.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run.model / file, run.out / file)
    save_file(tensors, run.out / "model.safetensors", metadata={"format": "pt"})
    record = {
        "package": package,
        "version": importlib.metadata.version(package),
        "bits": run.bits,
        "group": run.group,
        "tokens": run.tokens.stem,
        "levels": max(levels),
        **dataclasses.asdict(clock),
        **facts,
    }
    (run.out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def levels_per_group(weight: np.ndarray, group: int) -> int:
    """Return how many values the groups of a weight ``[out, in]`` take, at most.

    Values nearer than a ten thousandth of the group's largest count once: that is the
    rounding of a dequantization in float32 or less.
    """
    groups = np.sort(weight.reshape(-1, group).astype(np.float64), axis=1)
    gaps = np.diff(groups, axis=1) > 1e-4 * np.abs(groups).max(1, keepdims=True)
    return int(gaps.sum(1).max()) + 1


def _read_float(path: Path) -> dict[str, np.ndarray]:
    """Read a file of bfloat16 or float32 tensors as float32, with numpy alone."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + i for i in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            halves = np.frombuffer(raw[begin:end], np.uint16).astype(np.uint32)
            values = (halves << 16).view(np.float32)
        elif entry["dtype"] == "F32":
            values = np.frombuffer(raw[begin:end], np.float32)
        else:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16 or F32")
        out[name] = values.reshape(entry["shape"]).copy()
    return out


def main() -> None:
    """Draw the calibration tokens of every seed into ``--out``."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    run = parser.parse_args()
    tokenizer = Tokenizer.from_file(os.fspath(run.model / "tokenizer.json"))
    tokens = np.asarray(tokenizer.encode(run.text.read_text("utf-8")).ids, np.int32)
    run.out.mkdir(parents=True, exist_ok=True)
    for seed in DRAWS:
        np.save(run.out / f"tokens-{seed}.npy", calibration_draw(tokens, seed))
    print(f"{tokens.size:,} tokens; {len(DRAWS)} draws in {run.out}")


if __name__ == "__main__":
    main()
