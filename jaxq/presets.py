"""The recipes that have names, as the field uses them.

Those called after a method (``-gptq``, ``-autoround``, ``-awq``, ``-smoothquant``) need
calibration data, and so does ``w4a4-nvfp4``, for the one static number of its
activations; ``-bcq``, ``llm-int8`` and the others do not.

Two rules hold in all of them. Embedding tables, output heads and tables that are both
are int8 per row, weight-only: they are a large part of small models, and lose next to
nothing at 8 bits. Routers (the gates of mixtures of experts) stay float, as do norms
and biases, which no product consumes.
"""

from jaxq.method import (
    Chain,
    Method,
    autoround,
    awq,
    bcq,
    chain,
    gptq,
    rtn,
    smoothquant,
)
from jaxq.names import lookup
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec

GROUP = 64

_ROWS = QuantSpec("int8", "channel")
_KEPT = (
    Rule("re:(.*/)?(router|gate|[^/]*_router|[^/]*expert_gate)(/.*)?", required=False),
    Rule("re:(.*/)?relative_attention_bias(/.*)?", required=False),
    Rule("*", _ROWS, ops=("gather",), required=False),
    Rule("re:(.*/)?(lm_head|head|unembed|embed_out)(/.*)?", _ROWS, required=False),
)


def _grouped(format: str) -> QuantSpec:
    """Return an integer format in groups with zero points and bfloat16 scales."""
    return QuantSpec(format, GROUP, symmetric=False, scale="bfloat16")


def _signs(bits: int) -> QuantSpec:
    """Return sums of signs in groups, no offset, bfloat16 scales."""
    return QuantSpec(f"uint{bits}", GROUP, scale="bfloat16", binary=True)


def _preset(
    name: str,
    weight: QuantSpec,
    activation: QuantSpec | None = None,
    method: Method | Chain | str = "rtn",
    static: bool = False,
) -> Recipe:
    """Return the recipe that applies one spec and method to all products."""
    return Recipe(name, (*_KEPT, Rule("*", weight, activation, static, method)))


# of the symmetric grids the one that loses least at 4 bits (benchmarks/results)
_SIGNED = QuantSpec("int4", GROUP, grid="full", scale="bfloat16")
_INT8 = QuantSpec("int8", "channel")
_INT8_TOKEN = QuantSpec("int8", "token")
_FP8_TOKEN = QuantSpec("fp8_e4m3", "token")
# with a divisor, as compressed-tensors has it: a factor may have no equal reciprocal
_NVFP4 = QuantSpec(
    "fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor", scale="inverse_float32")
)
_DOUBLE = QuantSpec("dynamic8", 256, center=True)
# LLM.int8()'s threshold: channels with larger activations are multiplied in float
_INT8_OUTLIERS = QuantSpec("int8", "token", outliers=6.0)

# What the ablation on the demo model chose (benchmarks/results/gptq_ablation.md)
_BEST = {"damping": 0.01, "drift": 0.75, "correction": "target", "sweeps": 2}
_GPTQ = gptq(**_BEST)
_TUNED = autoround(**_BEST)
_QUERY_OR_KEY = "re:.*(q_proj|k_proj|query|key)(/.*)?"


def _awq_preset(name: str, weight: QuantSpec) -> Recipe:
    """Return AWQ; queries and keys are not clipped: the softmax needs extremes."""
    keep = Rule(_QUERY_OR_KEY, weight, solver=chain(awq(), rtn()), required=False)
    clip = Rule("*", weight, solver=chain(awq(), rtn(clip="output")))
    return Recipe(name, (*_KEPT, keep, clip))


_ROWS_OF_TABLE: tuple[Recipe, ...] = (
    _preset("w8a16", QuantSpec("int8", "channel")),
    _preset("w4a16", _grouped("uint4"), method=rtn(clip="mse")),
    _preset("w3a16", _grouped("uint3"), method=rtn(clip="mse")),
    _preset("w2a16", _grouped("uint2"), method=rtn(clip="mse")),
    _preset("w8a8", QuantSpec("int8", "channel"), _INT8_TOKEN),
    _preset("w4a8", _SIGNED, _INT8_TOKEN, method=rtn(clip="mse")),
    _preset("nf4", QuantSpec("nf4", 64)),
    _preset("nf4-dq", QuantSpec("nf4", 64, scale=_DOUBLE)),
    _preset("fp8", QuantSpec("fp8_e4m3", "channel"), _FP8_TOKEN),
    _preset("mxfp4", QuantSpec("fp4_e2m1", 32, scale="e8m0")),
    _preset("nvfp4", _NVFP4),
    _preset("w4a4-nvfp4", _NVFP4, _NVFP4, static=True),
    _preset("w4a16-gptq", _grouped("uint4"), method=_GPTQ),
    _preset("w3a16-gptq", _grouped("uint3"), method=_GPTQ),
    _preset("w2a16-gptq", _grouped("uint2"), method=_GPTQ),
    _preset("w4a16-autoround", _grouped("uint4"), method=_TUNED),
    _preset("w3a16-autoround", _grouped("uint3"), method=_TUNED),
    _preset("w2a16-autoround", _grouped("uint2"), method=_TUNED),
    _preset("w4a16-bcq", _signs(4), method=bcq()),
    _preset("w3a16-bcq", _signs(3), method=bcq()),
    _preset("w2a16-bcq", _signs(2), method=bcq()),
    _awq_preset("w4a16-awq", _grouped("uint4")),
    _awq_preset("w3a16-awq", _grouped("uint3")),
    _preset("w8a8-smoothquant", _INT8, _INT8_TOKEN, chain(smoothquant(0.5))),
    _preset("w4a8-gptq", _SIGNED, _INT8_TOKEN, _GPTQ),
    _preset("llm-int8", _INT8, _INT8_OUTLIERS),
)

PRESETS: dict[str, Recipe] = {recipe.name: recipe for recipe in _ROWS_OF_TABLE}


def as_recipe(cfg: str | Recipe | QuantSpec, group_size: int | None = None) -> Recipe:
    """Return the recipe that ``cfg`` stands for.

    Args:
        cfg: a preset's name, a `Recipe`, or a `QuantSpec` for every product.
        group_size: replaces the group size of rules that have one.

    Raises:
        UnknownNameError: on an unknown preset.
        TypeError: on anything else.
        ValueError: when a group size is given but nothing is grouped.
    """
    if isinstance(cfg, QuantSpec):
        recipe = Recipe(cfg.describe(), (Rule("*", cfg),))
    elif isinstance(cfg, str):
        recipe = lookup(PRESETS, cfg, "preset")
    elif isinstance(cfg, Recipe):
        recipe = cfg
    else:
        raise TypeError(
            f"cfg must be a preset's name, a Recipe or a QuantSpec, got "
            f"{type(cfg).__name__}"
        )
    return recipe if group_size is None else recipe.with_group_size(group_size)
