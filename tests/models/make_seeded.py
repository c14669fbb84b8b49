"""Makes what is stored of the seeded models: configs, and transformers' logits.

    python -m tests.models.make_seeded [NAME ...]

Needs torch and transformers. Weights come from NumPy's generator in bfloat16 under the
names that jaxq gives them; transformers must find every one, and computes in float32.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.models import FAMILIES
from jaxq.models.family import CAUSAL, ENCODER_DECODER
from tests.models.seeded import CASES, SEEDED, settings_of, write_seeded

BATCH, LENGTH = 2, 24


def inputs(name: str) -> dict[str, np.ndarray]:
    """What a case is computed on; token 0 and 1 mean padding to some."""
    kind = FAMILIES[CASES[name][0]].kind
    rng = np.random.default_rng(1)
    made = {"tokens": rng.integers(2, 64, (BATCH, LENGTH)).astype(np.int32)}
    if kind != CAUSAL:
        mask = np.ones((BATCH, LENGTH), np.int32)
        mask[1, 17:] = 0
        made["mask"] = mask
    if kind == ENCODER_DECODER:
        made["targets"] = rng.integers(2, 64, (BATCH, 11)).astype(np.int32)
    return made


def transformers_output(folder: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What transformers computes in float32 from a folder: logits or hidden states."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    # Falcon's eager attention adds alibi twice, beside the scores and in the mask
    attention = "sdpa" if config.get("alibi") else "eager"
    model, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
    )
    # the pooler of an encoder is not ours: it is of no use to sentence embeddings
    missing = [n for n in info["missing_keys"] if "pooler" not in n]
    assert not missing, missing
    assert not info["unexpected_keys"], info["unexpected_keys"]
    names = {"tokens": "input_ids", "mask": "attention_mask"}
    names["targets"] = "decoder_input_ids"
    given = {
        names[n]: torch.tensor(a, dtype=torch.long)
        for n, a in arrays.items()
        if n in names
    }
    with torch.no_grad():
        out: Any = model.eval()(**given)
    found = out.logits if "logits" in out else out.last_hidden_state
    return found.numpy()


def config_of(name: str) -> dict[str, Any]:
    """The config as transformers writes it, in bfloat16."""
    from transformers import AutoConfig

    family = FAMILIES[CASES[name][0]]
    made = AutoConfig.for_model(
        family.model_type or family.name, **settings_of(name), dtype="bfloat16"
    )
    return json.loads(made.to_json_string())


def make(name: str) -> None:
    """Writes one case."""
    from safetensors.numpy import save_file

    config, arrays = config_of(name), inputs(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_seeded(Path(scratch), config)
        logits = transformers_output(folder, arrays)
    target = SEEDED / name
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    (target / "config.json").write_text(text)
    save_file(arrays | {"logits": logits}, target / "golden.safetensors")
    print(name, logits.shape, float(np.abs(logits).max()))


def main() -> None:
    for name in sys.argv[1:] or CASES:
        make(name)


if __name__ == "__main__":
    main()
