"""What presets mean for encoders."""

import dataclasses

import pytest

from jaxq.encoder_presets import ENCODER_PRESETS, as_encoder_recipe
from jaxq.presets import PRESETS, as_recipe
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec

WEIGHT = QuantSpec("int8", 64, scale="bfloat16")
ACTIVATION = QuantSpec("int8", 64, symmetric=False)
PRODUCT = ("dot_general",)


def layer(part):
    return f"params/encoder/layer_3/{part}/kernel"


def found(name, part, ops=PRODUCT):
    rule = as_encoder_recipe(name).rule_for(layer(part), ops)
    return rule.weight, rule.activation


@pytest.mark.parametrize("part", ["attention/self/value", "intermediate/dense"])
def test_int8_weights_and_activations_have_groups(part):
    assert found("w8a8", part) == (WEIGHT, ACTIVATION)


@pytest.mark.parametrize("name", ["w4a16", "w3a16-gptq", "w2a16-autoround", "w4a8"])
def test_below_8_bits_values_and_tables_are_int8_and_the_rest_is_the_presets(name):
    body = PRESETS[name].rules[-1]
    activation = body.activation and ACTIVATION
    assert found(name, "attention/self/value") == (WEIGHT, activation)
    assert found(name, "word_embeddings", ("gather",)) == (WEIGHT, None)
    for part in ("attention/self/query", "attention/output/dense", "output/dense"):
        assert found(name, part) == (body.weight, activation), part


@pytest.mark.parametrize("name", ENCODER_PRESETS)
def test_solvers_and_transforms_are_the_presets(name):
    recipe, plain = ENCODER_PRESETS[name], PRESETS[name]
    assert recipe.name == f"{name}-encoder"
    for part in ("attention/self/query", "attention/self/value", "output/dense"):
        mine = recipe.rule_for(layer(part), PRODUCT)
        theirs = plain.rule_for(layer(part), PRODUCT)
        assert (mine.solver, mine.transforms) == (theirs.solver, theirs.transforms)
        options = dict(theirs.options)
        if "damping" in options:
            assert options["damping"] < dict(mine.options)["damping"] == 0.1
            options["damping"] = 0.1
        assert dict(mine.options) == options
    # routers, biases of positions and heads keep their rules
    kept = (plain.rules[0], plain.rules[1], plain.rules[3])
    assert kept == (recipe.rules[0], recipe.rules[1], recipe.rules[3])


def test_what_is_ones_own_stays():
    own = Recipe("w8a8", (Rule("*", QuantSpec("int8")),))
    assert as_encoder_recipe(own) is own
    renamed = dataclasses.replace(PRESETS["w8a8"], name="plain")
    assert as_encoder_recipe(renamed) is renamed
    spec = QuantSpec("int4", 16)
    assert as_encoder_recipe(spec) == as_recipe(spec)
    for name in ("nf4", "llm-int8", "w8a8-smoothquant", "w8a16"):
        assert as_encoder_recipe(name) is PRESETS[name]


def test_a_preset_by_itself_is_that_by_its_name():
    assert as_encoder_recipe(PRESETS["w8a8"]) is ENCODER_PRESETS["w8a8"]


def test_a_group_size_is_that_of_values_and_tables_too():
    recipe = as_encoder_recipe("w4a16", 32)
    assert recipe.name == "w4a16-encoder-g32"
    blocks = {rule.weight.block for rule in recipe.rules if rule.weight}
    assert blocks == {32, "channel"}  # heads keep their rows
    assert as_recipe("w4a16").rules[-1].weight.block == 64


@pytest.mark.parametrize("name", ENCODER_PRESETS)
def test_they_survive_files(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    ENCODER_PRESETS[name].dump(path)
    assert Recipe.load(path) == ENCODER_PRESETS[name]
