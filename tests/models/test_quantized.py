"""Every family under presets: what stays float, and that what is made computes."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxq.lm import load_model
from jaxq.models import FAMILIES
from jaxq.models.family import CAUSAL
from tests.models.seeded import CASES, SEEDED, stored_config, write_seeded

ONE_EACH = {row: name for name, (row, _) in reversed(CASES.items())}
KEPT = (
    "gate/kernel",  # routers
    "shared_expert_gate/kernel",
    "relative_attention_bias/embedding",
)
# RoBERTa's, of one row, which is not looked up but added to all
ONE_ROW = "token_type_embeddings/embedding"
TEXT = np.random.default_rng(2).integers(2, 64, (4, 32)).astype(np.int32)
# Random weights of width 32 have no redundancy: 4 bits cost a tenth to a third. With
# experts, a token that goes to another one is all wrong.
WORST = {"w8a8": 0.1, "w4a16-gptq": 0.5}
WORST_OF_EXPERTS = {"w8a8": 0.25, "w4a16-gptq": 0.8}


def load(name, folder):
    return load_model(write_seeded(folder, stored_config(name)), jnp.float32)


@pytest.mark.parametrize("row", ONE_EACH)
def test_no_weight_stays_float_unexpectedly(row, tmp_path):
    model = load(ONE_EACH[row], tmp_path)
    rows = list(model.plan("w4a16", group_size=16))
    floats = [r.path for r in rows if r.rule is None or r.rule.weight is None]
    matrices = [path for path in floats if path.endswith(("kernel", "embedding"))]
    matrices += [path for path in floats if "/experts/" in path]
    kept = KEPT if ONE_EACH[row] != "roberta" else (ONE_ROW,)
    assert not [path for path in matrices if not path.endswith(kept)]
    leaves = {path.rsplit("/", 1)[1] for path in floats}
    assert leaves <= {"bias", "weight", "kernel", "embedding"}
    assert len(rows) - len(floats) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("preset", WORST)
@pytest.mark.parametrize("row", ONE_EACH)
def test_quantized_outputs_stay_near(row, preset, tmp_path):
    name = ONE_EACH[row]
    model = load(name, tmp_path)
    stored = load_file(SEEDED / name / "golden.safetensors")
    names = ("tokens", "targets", "mask")
    given = [jnp.asarray(stored[n]) for n in names if n in stored]
    four = "w4" in preset
    text = TEXT.reshape(-1, min(TEXT.shape[1], model.config.context))
    small = model.quantize(
        preset,
        calibration=text if four else None,
        group_size=16 if four else None,
    )
    assert set(small.fallbacks) <= {p for p in small.evidence if "/experts/" in p}
    got, want = np.asarray(small.apply(small.params, *given)), stored["logits"]
    if "mask" in stored and "targets" not in stored:
        kept = stored["mask"].astype(bool)
        got, want = got[kept], want[kept]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    sparse = any("/experts/" in path for path in small.evidence)
    assert error < (WORST_OF_EXPERTS if sparse else WORST)[preset]
    # nothing looks ahead, but for angles that depend on the length of the text
    if FAMILIES[row].kind == CAUSAL and name != "llama_dynamic":
        alone = small.apply(small.params, given[0][:, :4])
        np.testing.assert_allclose(alone, got[:, :4], rtol=0, atol=1e-2)
