"""Makes the golden models: tiny random ones, and what transformers computes with them.

    python tests/models/make_golden.py tests/data/golden

Needs torch and transformers. Weights come from NumPy's generator and are stored in
bfloat16, so that they are the same whatever the version of torch; logits are computed
in float32 from exactly those weights.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    # Wavelengths of 6, 20, 63 and 199 tokens: every scaling has something to bend.
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings},
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", rope() | {"num_key_value_heads": 4}),
    "llama3": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama_linear": ("llama", rope("linear", factor=4.0)),
    "llama_yarn": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "llama_yarn_mscale": (
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=8.0,
            beta_slow=2.0,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "llama_biased": (
        "llama",
        rope()
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
        },
    ),
    # Shorter than the text, so that the window shuts tokens out.
    "mistral": ("mistral", rope() | {"sliding_window": 5}),
    "mistral_full": ("mistral", rope() | {"sliding_window": None}),
    "qwen2": ("qwen2", rope() | {"tie_word_embeddings": True}),
    "qwen2_windowed": (
        "qwen2",
        rope()
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", rope() | {"head_dim": 16}),
    "qwen3_biased": (
        "qwen3",
        rope() | {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
}
BATCH, LENGTH = 2, 24


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(0)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        values = rng.normal(0, scale, shape)
        weights[name] = values + (1.0 if "norm" in name else 0.0)
    return weights


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes in float32 from a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def make(name: str, folder: Path) -> None:
    """Writes one model, its input and its logits."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CASES[name]
    config = AutoConfig.for_model(
        kind, **(SMALL | settings), bos_token_id=0, eos_token_id=0, dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    weights = {
        key: torch.tensor(value, dtype=torch.float32).to(torch.bfloat16)
        for key, value in random_weights(shapes).items()
    }
    model = model.to(torch.bfloat16)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (BATCH, LENGTH))
    tokens = tokens.astype(np.int32)
    logits = logits_of(folder, tokens)
    save_file({"tokens": tokens, "logits": logits}, folder / "golden.safetensors")


def main() -> None:
    root = Path(sys.argv[1])
    for name in CASES:
        make(name, root / name)
        size = sum(f.stat().st_size for f in (root / name).iterdir())
        print(name, size, "bytes")
    (root / "cases.json").write_text(json.dumps(sorted(CASES), indent=2) + "\n")


if __name__ == "__main__":
    main()
