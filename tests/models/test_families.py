"""Reading config.json: both spellings, and refusing what is not implemented."""

import json
from pathlib import Path

import pytest

from jaxq.models import FAMILIES, ConfigError, find_family
from jaxq.models.rope import Rope
from jaxq.names import UnknownNameError

DATA = Path(__file__).parent.parent / "data"
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
    for path in DATA.glob("*/*/config.json"):
        config = json.loads(path.read_text())
        family = find_family(config)
        family.read_config(config)
        kinds.add(family.name)
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "short_factor None",
        ),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes'"),
        ({"is_encoder_decoder": True}, "'is_encoder_decoder' is True"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small'"),
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


def test_refusals_of_other_families_name_the_key():
    small = {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx"):
        find_family(small).read_config(small)
    sparse = LLAMA | {
        "architectures": ["MixtralForCausalLM"],
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 3,
    }
    with pytest.raises(ConfigError, match="3 is more than the 2 experts"):
        find_family(sparse).read_config(sparse)


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
    with pytest.raises(UnknownNameError, match="did you mean 'Qwen3MoeForCausalLM'"):
        find_family({"architectures": ["Qwen3MoeModelForCausalLM"]})
    with pytest.raises(UnknownNameError, match=r"'rwkv'.*Known: .*llama, mistral"):
        find_family({"model_type": "rwkv"})
    with pytest.raises(ConfigError, match="neither 'architectures' nor 'model_type'"):
        find_family({})


def test_the_architecture_alone_or_the_type_alone_suffices():
    assert find_family({"model_type": "qwen3"}) is FAMILIES["qwen3"]
    assert find_family({"architectures": ["MistralForCausalLM"]}) is FAMILIES["mistral"]


PARTS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "num_decoder_layers",
    "num_local_experts",
    "num_experts",
)
CONFIGS = {
    path.parent.name: json.loads(path.read_text())
    for path in sorted((DATA / "seeded").glob("*/config.json"))
}


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, config in CONFIGS.items() for key in PARTS if key in config],
)
def test_more_parts_than_can_be_gone_through_are_refused(name, key):
    config = CONFIGS[name] | {key: 10**9}
    with pytest.raises(ConfigError, match=f"{key}.*1000000000.*more than 10000"):
        find_family(config).read_config(config)
