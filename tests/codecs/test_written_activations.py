"""Checkpoints whose inputs are quantized: transformers' logits from them are ours.

compressed-tensors rounds activations in a simulation of its own, after which the
product is one of floats, as here. Both run in float32, on the same weights: a number
that lies on a rounding boundary may fall to the other side, so the tolerance is not
that of float32 everywhere, but for nine of ten logits it is.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import QTensor, QuantSpec, Recipe, Rule
from jaxq.ops.activation import quantized_input
from tests.tiny_lm import write_tiny

pytestmark = [pytest.mark.compare, pytest.mark.filterwarnings("ignore")]

TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)
NVFP4 = QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor"))
MXFP4 = QuantSpec("fp4_e2m1", 32, scale="e8m0")
MXFP8 = QuantSpec("fp8_e4m3", 32, scale="e8m0")
FORMS = {
    "nvfp4": (NVFP4, NVFP4, True),
    "mxfp4": (MXFP4, dataclasses.replace(MXFP4, exponent="near"), False),
    "mxfp8": (MXFP8, dataclasses.replace(MXFP8, exponent="near"), False),
    "mxfp4-fp8": (MXFP4, QuantSpec("fp8_e4m3", 64), False),
    "fp8": (QuantSpec("fp8_e4m3"), QuantSpec("fp8_e4m3", "tensor"), True),
    "w4a4": (
        QuantSpec("int4", 32, grid="gptq", scale="bfloat16"),
        QuantSpec("int4", "token", grid="gptq"),
        False,
    ),
    "w8a8": (
        QuantSpec("int8", scale="bfloat16"),
        QuantSpec("int8", "token", grid="gptq"),
        False,
    ),
}
# of each token the largest number, if it is negative, lies half-way between two codes
# there, so that a difference in the last bit changes it; and a static scale of fp8 is
# loaded in the model's dtype
TIES = ("w4a4", "w8a8", "fp8")


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny") / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "dtype": "bfloat16"}
    return jaxq.load_model(write_tiny(place, **sizes))


def _quantized(lm, form):
    weight, activation, static = FORMS[form]
    rule = Rule("*layers*kernel", weight, activation, static)
    recipe = Recipe(form, (Rule("*embed*"), Rule("*lm_head*"), rule, Rule("*")))
    return lm.quantize(recipe, calibration=TOKENS if static else None)


def _ours(lm):
    """Logits in float32, from weights that are not rounded to bfloat16."""

    def wide(leaf):
        if isinstance(leaf, QTensor):
            return dataclasses.replace(leaf, dtype=jnp.dtype("float32"))
        return leaf.astype(jnp.float32)

    params = jax.tree.map(wide, lm.params, is_leaf=lambda x: isinstance(x, QTensor))
    return np.asarray(jax.jit(jaxq.quantized(lm.forward))(params, jnp.asarray(TOKENS)))


def _theirs(folder, lm):
    """Return the library's model, and its logits in float32 from our weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        model(tokens)  # takes the weights out of their packing
        torch.nn.Module.float(model)
        for i in range(model.config.num_hidden_layers):
            for part in ("self_attn", "mlp"):
                kernels = lm.params["params"][f"layers_{i}"][part]
                for name, leaf in kernels.items():
                    layer = model.get_submodule(f"model.layers.{i}.{part}.{name}")
                    values = np.asarray(leaf["kernel"].dequantize(jnp.float32)).T
                    near = torch.tensor(values.copy())
                    assert (layer.weight - near).abs().max() < 0.01 * near.abs().max()
                    layer.weight.data = near
        return model, model(tokens).logits.numpy()


@pytest.mark.parametrize("form", FORMS)
def test_the_library_rounds_the_inputs_that_we_wrote_as_we_do(tmp_path, floats, form):
    """One input, to the bit; and the model's logits."""
    lm = _quantized(floats, form)
    done = jaxq.convert(lm, tmp_path / "out", "compressed-tensors")
    assert done.lossless
    model, theirs = _theirs(tmp_path / "out", lm)
    ours = _ours(lm)
    _compare_one_input(model, lm)
    if form not in TIES:
        error = np.abs(theirs - ours)
        assert np.quantile(error, 0.9) < 1e-5 * ours.std()
        assert error.max() < 0.2 * np.abs(_ours(_weight_only(lm)) - ours).max()
    again = jaxq.load_model(tmp_path / "out")
    assert not again.notes
    np.testing.assert_allclose(_ours(again), ours, atol=1e-4 * float(ours.std()))


def _compare_one_input(model, lm):
    import torch
    from compressed_tensors.quantization import forward_quantize

    w = lm.params["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    if hasattr(layer, "input_scale"):  # they round it to the model's bfloat16
        layer.input_scale.data = torch.tensor(np.asarray(w.activation_scale).ravel())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 128)) * rng.uniform(0.1, 3, (2, 7, 1))
    x = x.astype(np.float32)
    nested = isinstance(w.activation.scale, QuantSpec)
    settings = layer.quantization_scheme.input_activations
    theirs = forward_quantize(layer, torch.tensor(x), "input", settings).numpy()
    read = np.asarray(jax.jit(quantized_input)(x, w))
    # a global scale that multiplies here divides there
    np.testing.assert_allclose(read, theirs, rtol=2e-7 if nested else 0)
    assert np.abs(read - x).max() > 0.01


def _weight_only(lm):
    def plain(leaf):
        if not isinstance(leaf, QTensor):
            return leaf
        return dataclasses.replace(leaf, activation=None, activation_scale=None)

    leaf = lambda x: isinstance(x, QTensor)
    return dataclasses.replace(lm, params=jax.tree.map(plain, lm.params, is_leaf=leaf))


def test_what_the_library_saves_keeps_its_inputs_scales(tmp_path, floats):
    import torch
    from transformers import AutoModelForCausalLM

    lm = _quantized(floats, "nvfp4")
    jaxq.convert(lm, tmp_path / "ours", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "theirs")
    again = jaxq.load_model(tmp_path / "theirs")
    assert not again.notes
    ours = _ours(lm)
    np.testing.assert_allclose(_ours(again), ours, atol=1e-4 * float(ours.std()))
