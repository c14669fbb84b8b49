"""Cut a few layers out of whole checkpoints: `python -m tests.codecs.make_excerpts`.

Takes folders `format/variant` that hold a checkpoint in `model/` as a real library
wrote it, and in `ref/dequant_sha256.json` the digest of every weight as that library
dequantizes it. An excerpt is one safetensors file with the tensors of some layers, as
they were, and beside it as JSON the quantization config and the digests. Where the
library quantizes activations, an ``.npz`` has what it made of those of one layer.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file

from jaxq.checkpoints.huggingface import read_config
from jaxq.codecs.gguf_blocks import TYPES
from jaxq.codecs.reading import find_config, open_checkpoint
from jaxq.codecs.source import SafetensorsSource
from tests.codecs.excerpts import DATA, digest, write_gguf, write_raw

BLOCKS = DATA.parent / "gguf"

USUAL = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
CHOSEN = {
    "gptq/v1_b4_dynamic_lmhead": ("lm_head", "model.layers.1.self_attn.k_proj"),
    "fp8_block/deepseek_layout_partial_blocks": ("model.layers.0.mlp.gate_proj",),
    "fp8_block/transformers_b64": USUAL[:1],
    "fp8_block/transformers_b128_garbage_scales": ("model.layers.0.self_attn.o_proj",),
    "compressed_tensors/fp8_block": USUAL[:1],
    "autoround/auto_round_mixed_bits_bias": (
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.up_proj",
    ),
    "awq/autoawq_gemm_g32_bias_skip": ("model.layers.0.self_attn.v_proj",),
}


def main(root: Path) -> None:
    """Write an excerpt of every checkpoint below ``root``."""
    for digests in sorted(root.glob("*/*/ref/dequant_sha256.json")):
        folder = digests.parent.parent
        model = folder / "model"
        if not (model / "config.json").is_file():
            continue
        cut(folder.relative_to(root).as_posix(), model, json.loads(digests.read_text()))
    blocks(root / "gguf_raw" / "all_types")
    awq_layouts(root / "awq_raw" / "gemv")


def awq_layouts(folder: Path) -> None:
    """Write single layers that AutoAWQ packed for its other kernels.

    What gemv_fast rounds of its zero points is not what it dequantizes to, so its
    weight is kept, too.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = load_file(folder / "ref" / "dequant.safetensors")
    source = SafetensorsSource.of(folder)
    for case in manifest["cases"]:
        name, config = case["name"], {"quant_method": "awq", "bits": 4}
        config |= {"group_size": case["group_size"], "version": case["version"]}
        weight = expected[f"{name}.weight"]
        parts = [f"{name}.{suffix}" for suffix in ("qweight", "qzeros", "scales")]
        about = {"dtype": "F16", "shape": weight.shape, "sha256": digest(weight)}
        stem = DATA / f"awq_raw-{name}"
        write_raw(
            stem.with_suffix(".safetensors"),
            {p: (source.entry(p)[0], source.read(p)) for p in parts},
            {},
        )
        _describe(stem, manifest, config, {f"{name}.weight": about})
        if case["version"] == "gemv_fast":
            np.save(stem.with_suffix(".npy"), weight)


def blocks(folder: Path) -> None:
    """Write one row of every block type, and what ggml's C code makes of it."""
    expected = load_file(folder / "ref" / "dequant.safetensors")
    keep = dict(raw_tensors(folder / "tensors.gguf"))
    BLOCKS.mkdir(exist_ok=True)
    write_gguf(BLOCKS / "blocks.gguf", {"general.architecture": "none"}, keep)
    digests = {name: digest(expected[name]) for name in keep}
    (BLOCKS / "blocks.json").write_text(json.dumps(digests, indent=1) + "\n")


def raw_tensors(
    path: Path,
) -> Iterator[tuple[str, tuple[int, tuple[int, ...], bytes]]]:
    """Yield the tensors whose types are known, in a file of which others may not be."""
    reader = GGUFReader(path)
    for tensor in reader.tensors:
        kind = int(tensor.tensor_type)
        if kind in TYPES:
            shape = tuple(int(n) for n in tensor.shape[::-1])
            yield tensor.name, (kind, shape, tensor.data.tobytes())


def cut(name: str, model: Path, digests: dict[str, dict[str, object]]) -> None:
    """Write one excerpt."""
    config = read_config(model)
    checkpoint = open_checkpoint(model, config)
    source = checkpoint.source
    if not isinstance(source, SafetensorsSource) or checkpoint.reader is None:
        return
    manifest = json.loads((model.parent / "manifest.json").read_text())
    modules = CHOSEN.get(name, USUAL)
    observed = manifest.get("activation_quant_module")
    if observed and observed not in modules:
        modules = (*modules, observed)
    parts = [p for module in modules for p in checkpoint.reader.parts(module)]
    tensors = {p: (source.entry(p)[0], np.asarray(source.read(p))) for p in parts}
    kept = {f"{module}.weight" for module in modules}
    metadata = {k: v for k, v in source.metadata.items() if k in kept}
    stem = DATA / name.replace("/", "-")
    write_raw(stem.with_suffix(".safetensors"), tensors, metadata)
    if observed:
        met = load_file(model.parent / "ref" / "io.safetensors")
        values = {key: met[f"act_{key}"] for key in ("x", "xq")}
        np.savez(stem.with_suffix(".npz"), module=observed, **values)
    weights = {n: digests[n] for n in sorted(kept)}
    _describe(stem, manifest, find_config(model, config), weights)


def _describe(stem: Path, manifest: Any, config: Any, weights: Any) -> None:
    about = {
        "written_by": manifest.get("written_by", ""),
        "versions": manifest.get("versions", {}),
        "quantization_config": config,
        "weights": weights,
    }
    stem.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
