"""Reading config.json: both spellings, and refusing what is not implemented."""

import json
from pathlib import Path

import jax
import pytest

from jaxq.models import FAMILIES, ConfigError, find_family
from jaxq.models.rope import Rope
from jaxq.names import UnknownNameError

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def read(**changes):
    config = LLAMA | changes
    return find_family(config).read_config(config)


def test_what_is_missing_is_what_hugging_face_takes():
    config = read()
    assert config.num_kv_heads == 4
    assert config.head_dim == 8
    assert config.context == 2048
    assert config.norm_eps == 1e-6
    assert config.rope == Rope(theta=10_000.0)
    assert not config.tied


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 500.0},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        ),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 500.0,
                    "factor": 2.0,
                }
            },
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 512,
                }
            },
            {
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0},
                "original_max_position_embeddings": 512,
            },
        ),
    ],
)
def test_old_and_new_spelling_of_rope_mean_the_same(old, new):
    assert read(**old) == read(**new)


def test_every_family_reads_what_transformers_wrote():
    kinds = set()
    for path in GOLDEN.glob("*/config.json"):
        config = json.loads(path.read_text())
        family = find_family(config)
        family.read_config(config)
        kinds.add(family.name)
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_variables_correspond_one_to_one(name):
    family = FAMILIES[name]
    config = family.read_config(LLAMA | {"num_key_value_heads": 2})
    slots = family.slots(config)
    leaves, _ = jax.tree_util.tree_flatten_with_path(family.abstract(config))
    paths = {tuple(k.key for k in keys): leaf.shape for keys, leaf in leaves}
    assert {slot.path for slot in slots.values()} == set(paths)
    assert len(slots) == len(paths)
    query = slots["model.layers.1.self_attn.q_proj.weight"]
    assert query.transposed
    assert paths[query.path] == query.shape[::-1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one for all"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "warp": 1}}, "warp"),
        ({"rope_scaling": {"type": "linear"}}, "factor None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"hidden_size": -3}, "'hidden_size' is -3"),
        ({"vocab_size": "many"}, "'vocab_size' is 'many'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named.replace("[", r"\[")):
        read(**changes)


@pytest.mark.parametrize("value", [None, ["full_attention", "sliding_attention"]])
def test_a_list_of_layers_with_windows(value):
    config = LLAMA | {
        "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "layer_types": value,
    }
    assert find_family(config).read_config(config).windows == (None, 7)


def test_an_unknown_architecture_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'Qwen3ForCausalLM'"):
        find_family({"architectures": ["Qwen3MoeForCausalLM"]})
    with pytest.raises(UnknownNameError, match=r"'gpt2'.*Known: llama, mistral"):
        find_family({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match="neither 'architectures' nor 'model_type'"):
        find_family({})


def test_the_architecture_alone_or_the_type_alone_suffices():
    assert find_family({"model_type": "qwen3"}) is FAMILIES["qwen3"]
    assert find_family({"architectures": ["MistralForCausalLM"]}) is FAMILIES["mistral"]
