"""What presets mean for encoders, whose activations and values ask for more care.

In encoders that norm what they add (BERT, RoBERTa) a few channels of the stream are ten
times larger than the others, nearly the same for every token, and often of one sign
(Bondarenko et al. 2021, https://arxiv.org/abs/2109.12948, who scale activations in
groups for it). One scale per token is then theirs alone. And of all matrices of equal
size it is the values whose errors turn a text's vector the most: the mean over tokens
is a mean of values. So, for an `Encoder`,

* activations that are int8 per token become int8 in groups, with zero points, and the
  int8 weights that meet them have the same groups;
* tables of embeddings are int8 in groups instead of rows;
* below 8 bits values stay int8, in the groups of the others;
* GPTQ damps its Hessian more: sentences are few tokens beside the windows of a stream.

`w8a8-smoothquant`, `llm-int8` and the rest stay what they are called for.
"""

import dataclasses

from jaxq.presets import GROUP, PRESETS, as_recipe
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec

DAMPING = 0.1
VALUES = "re:(.*/)?(v_proj|value)(/.*)?"

_WEIGHT = QuantSpec("int8", GROUP, scale="bfloat16")
_ACTIVATION = QuantSpec("int8", GROUP, symmetric=False)
_TABLES = Rule("*", _WEIGHT, ops=("gather",), required=False)

_ADAPTED = (
    *("w8a8", "w4a8", "w4a8-gptq"),
    *("w4a16", "w3a16", "w2a16"),
    *("w4a16-gptq", "w3a16-gptq", "w2a16-gptq"),
    *("w4a16-autoround", "w3a16-autoround", "w2a16-autoround"),
    *("w4a16-awq", "w3a16-awq"),
)


def _rule_for_encoders(rule: Rule) -> Rule:
    """Return the rule with what encoders ask for."""
    weight = rule.weight
    if weight is None:
        return rule
    if rule.ops == ("gather",):
        return _TABLES
    options = dict(rule.options)
    if "damping" in options:
        options["damping"] = DAMPING
    rule = dataclasses.replace(rule, options=tuple(options.items()))
    if rule.activation is None:
        return rule
    weight = _WEIGHT if weight.bits == 8 else weight
    return dataclasses.replace(rule, weight=weight, activation=_ACTIVATION)


def _for_encoders(preset: Recipe) -> Recipe:
    """Return a preset with what encoders ask for."""
    *kept, body = map(_rule_for_encoders, preset.rules)
    if body.weight is not None and body.weight.bits < 8:
        values = dataclasses.replace(body, match=VALUES, weight=_WEIGHT, required=False)
        kept.append(values)
    return Recipe(f"{preset.name}-encoder", (*kept, body))


ENCODER_PRESETS: dict[str, Recipe] = {n: _for_encoders(PRESETS[n]) for n in _ADAPTED}


def as_encoder_recipe(
    cfg: str | Recipe | QuantSpec, group_size: int | None = None
) -> Recipe:
    """Return the recipe that ``cfg`` stands for when the model is an encoder.

    A preset, by its name or itself, becomes that of `ENCODER_PRESETS` if there is one;
    recipes and specs of one's own stay as they are.

    Args:
        cfg: a preset's name, a `Recipe`, or a `QuantSpec` for every product.
        group_size: replaces the group size of rules that have one.

    Raises:
        UnknownNameError, TypeError, ValueError: as `jaxq.presets.as_recipe` does.

    Example:
        >>> as_encoder_recipe("w8a8").rules[-1].activation.describe()
        'int8 g64 asymmetric, float32 scales'
    """
    recipe = as_recipe(cfg)
    if PRESETS.get(recipe.name) == recipe:
        recipe = ENCODER_PRESETS.get(recipe.name, recipe)
    return as_recipe(recipe, group_size)
