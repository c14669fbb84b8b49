"""The names other people's code relies on, before and after the lazy imports."""

import types

import jaxq
from tests.tiny_lm import write_tiny

NAMES = [
    "quantize_params",
    "quantized",
    "dequantize_params",
    "sites",
    "plan",
    "explain",
    "calibrate",
    "quantize",
    "dequantize",
    "fake_quant",
    "save",
    "load",
    "load_model",
    "generate",
    "perplexity",
    "LM",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Rule",
    "PRESETS",
]


def test_functions_stay_functions(tmp_path):
    """A submodule of the same name would take a function's place once imported."""
    lm = jaxq.load_model(write_tiny(tmp_path / "tiny"))
    assert jaxq.generate(lm, "import", 2) == jaxq.generate(lm, "import", 2)
    lm.save(tmp_path / "saved")
    assert jaxq.load(tmp_path / "saved")["params"]
    for name in NAMES:
        assert not isinstance(getattr(jaxq, name), types.ModuleType), name
