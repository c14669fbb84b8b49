"""Recipes as data: which rule is whose, what files keep, what is refused."""

import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.formats import FORMATS
from jaxq.names import UnknownNameError, lookup
from jaxq.presets import PRESETS, as_recipe
from jaxq.recipe import Recipe, Rule
from jaxq.spec import GRIDS, SCALE_DTYPES, QuantSpec

INT8 = QuantSpec("int8")
TENSOR8 = QuantSpec("int8", "tensor")

# ------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*", "", True),
        ("*", "params/a/b", True),
        ("params/*/kernel", "params/layers/3/up/kernel", True),  # * crosses /
        ("params/?/kernel", "params/ab/kernel", False),
        ("kernel", "params/kernel", False),  # the whole path
        ("*KERNEL", "params/kernel", False),  # case matters
        ("layer_[0-3]/*", "layer_2/w", True),
        ("layer_[0-3]/*", "layer_4/w", False),
        (r"re:.*layer_(1|12)/.*", "params/layer_12/w", True),
        (r"re:.*layer_(1|12)/.*", "params/layer_2/w", False),
        (r"re:layer", "layer_1", False),  # the whole path, too
        (r"re:", "", True),
        ("a.c", "abc", False),  # a dot is a dot in a glob
    ],
)
def test_a_pattern_is_a_glob_or_a_regular_expression(pattern, path, expected):
    assert Rule(pattern).matches(path) is expected


def test_the_first_rule_that_matches_wins():
    first, second, third = Rule("*/head/*", INT8), Rule("*/kernel"), Rule("*", INT8)
    recipe = Recipe("r", (first, second, third))
    assert recipe.rule_for("params/head/kernel") is first
    assert recipe.rule_for("params/up/kernel") is second
    assert recipe.rule_for("params/up/bias") is third
    assert Recipe("r", (second, first)).rule_for("params/head/kernel") is second
    assert Recipe("r", (first,)).rule_for("params/up/bias") is None


def test_a_rule_may_ask_for_an_operation():
    rule = Rule("*", INT8, ops=("gather", "ragged_dot"))
    assert rule.matches("table", ("dot_general", "gather"))
    assert not rule.matches("table", ("dot_general",))
    assert not rule.matches("table")
    assert Rule("*", INT8, ops="gather") == Rule("*", INT8, ops=("gather",))


# --------------------------------------------------------------------- group sizes


def test_another_group_size_changes_groups_and_nothing_else():
    recipe = PRESETS["w4a16"]
    changed = recipe.with_group_size(128)
    assert changed.name == "w4a16-g128"
    for before, after in zip(recipe.rules, changed.rules, strict=True):
        if before.weight is None or before.weight.block != 64:
            assert after == before
        else:
            assert after.weight.to_dict() == before.weight.to_dict() | {"block": 128}
            assert after.options == before.options
    assert sum(a != b for a, b in zip(recipe.rules, changed.rules, strict=True)) == 1


def test_a_group_size_for_a_recipe_without_groups_is_refused():
    with pytest.raises(ValueError, match=r"group size 32 .*'w8a16'.*per channel"):
        as_recipe("w8a16", group_size=32)
    with pytest.raises(ValueError, match="block=0"):
        as_recipe("w4a16", group_size=0)


# ----------------------------------------------------------------------- as_recipe


def test_a_recipe_is_a_name_a_recipe_or_a_spec():
    assert as_recipe("nf4") is PRESETS["nf4"]
    recipe = Recipe("mine", (Rule("*", INT8),))
    assert as_recipe(recipe) is recipe
    assert as_recipe(INT8).rules == (Rule("*", INT8),)
    with pytest.raises(TypeError, match=r"name, a Recipe or a QuantSpec.*dict"):
        as_recipe({"rules": []})  # type: ignore[arg-type]


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_file(name, suffix, tmp_path):
    path = tmp_path / f"recipe.{suffix}"
    PRESETS[name].dump(path)
    loaded = Recipe.load(path)
    assert loaded == PRESETS[name]
    assert hash(loaded) == hash(PRESETS[name])
    parse = json.loads if suffix == "json" else yaml.safe_load
    assert parse(path.read_text())["name"] == name


def _made(make, **fields):
    try:
        return make(**fields)
    except ValueError:
        return None


texts = st.text(st.characters(codec="utf-8"), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
blocks = (
    st.sampled_from(["tensor", "channel", "token"])
    | st.integers(1, 512)
    | st.tuples(st.integers(1, 128), st.integers(1, 128))
)


def spec_strategy(scale):
    return st.builds(
        lambda **fields: _made(QuantSpec, **fields),
        format=st.sampled_from(sorted(FORMATS)),
        block=blocks,
        symmetric=st.booleans(),
        grid=st.sampled_from(GRIDS),
        scale=scale,
        center=st.booleans(),
    ).filter(lambda spec: spec is not None)


plain_scales = st.sampled_from(SCALE_DTYPES)
specs = spec_strategy(plain_scales | spec_strategy(plain_scales))
rules = st.builds(
    lambda **fields: _made(Rule, **fields),
    match=texts | st.sampled_from(["*", "re:.*(up|down)/kernel", "yes", "1e3", "~"]),
    weight=st.none() | specs,
    activation=st.none() | specs,
    static=st.booleans(),
    options=st.dictionaries(texts, scalars | st.lists(scalars, max_size=2), max_size=3),
    ops=st.lists(st.sampled_from(["gather", "dot_general"]), max_size=2),
    required=st.booleans(),
).filter(lambda rule: rule is not None)
recipes = st.builds(Recipe, texts, st.lists(rules, min_size=1, max_size=3))


@given(recipe=recipes, suffix=st.sampled_from(["yaml", "json"]))
@settings(max_examples=60)
def test_any_recipe_survives_a_file(tmp_path_factory, recipe, suffix):
    path = tmp_path_factory.mktemp("recipes") / f"r.{suffix}"
    recipe.dump(path)
    assert Recipe.load(path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("number", [1e-5, 1e300, 2.5, -math.inf])
def test_json_keeps_numbers_that_yaml_would_read_as_text(number, tmp_path):
    recipe = Recipe("r", (Rule("*", INT8, options={"x": number}),))
    recipe.dump(tmp_path / "r.json")
    ((_, value),) = Recipe.load(tmp_path / "r.json").rules[0].options
    assert type(value) is float
    assert value == number


def test_a_recipe_as_a_person_writes_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
        name: mine
        rules:
          - match: "*lm_head*"
          - match: "*"
            weight: {format: uint4, block: 32, symmetric: false, scale: bfloat16}
            activation: {format: int8, block: token}
            options: {clip: percentile, percent: 99.5}
        """
    )
    weight = QuantSpec("uint4", 32, False, scale="bfloat16")
    expected = Rule(
        "*",
        weight,
        QuantSpec("int8", "token"),
        options=(("clip", "percentile"), ("percent", 99.5)),
    )
    assert Recipe.load(path) == Recipe("mine", (Rule("*lm_head*"), expected))


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rulez": []}, "recipe field 'rulez'; did you mean 'rules'"),
        ({"name": "r"}, "needs 'rules'"),
        ({"rules": ["*"]}, "list of rules, each a mapping"),
        ({"rules": []}, "'recipe' has no rules"),
        ({"rules": [{"mach": "*"}]}, "rule field 'mach'; did you mean 'match'"),
        ({"rules": [{"match": 3}]}, "match=3 must be text.*quote"),
        ({"rules": [{"match": "re:("}]}, r"rule 're:\('.*unterminated"),
        ({"rules": [{"solver": "rtm"}]}, "solver 'rtm'; did you mean 'rtn'"),
        ({"rules": [{"ops": ["gathr"]}]}, "operation 'gathr'; did you mean 'gather'"),
        ({"rules": [{"weight": "int4"}]}, r"weight='int4' must be a QuantSpec.*format"),
        (
            {"rules": [{"weight": {"format": "itn4"}}]},
            "format 'itn4'; did you mean 'int4'",
        ),
        (
            {"rules": [{"weight": {"format": "int4", "blok": 3}}]},
            "QuantSpec field 'blok'; did you mean 'block'",
        ),
        (
            {"rules": [{"activation": {"format": "int8", "block": "token"}}]},
            "quantizes the activation but leaves the weight float",
        ),
        (
            {
                "rules": [
                    {
                        "weight": {"format": "int8"},
                        "activation": {"format": "int8", "block": "token"},
                        "static": True,
                    }
                ]
            },
            "static activation scale, which is one number.*block='tensor'",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "case",
)
def test_a_bad_file_is_named_with_what_is_wrong(data, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        Recipe.load(path)
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.yaml", b"rules: [", "is not YAML"),
        ("r.json", b"{'rules': 1}", "is not JSON"),
        ("r.yaml", b"\xff\xfe\x00", "is not YAML"),
        ("r.yaml", b"", "holds no recipe"),
        ("r.json", b"[1]", "holds no recipe"),
        ("r.yaml", b"rules: [{weight: {block: 3}}]", "format"),
        ("r.yaml", b"a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        Recipe.load(path)


def test_a_static_scale_needs_an_activation():
    with pytest.raises(ValueError, match="static activation scale"):
        Rule("*", INT8, static=True)
    assert Rule("*", INT8, TENSOR8, static=True).static


@pytest.mark.parametrize(
    ("name", "near"), [("w4a61", "w4a16"), ("nf4dq", "nf4-dq"), ("fp8_", "fp8")]
)
def test_a_mistyped_preset_suggests_the_nearest(name, near):
    with pytest.raises(UnknownNameError, match=f"'{name}'; did you mean '{near}'"):
        as_recipe(name)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(UnknownNameError, match=r"'zzz'\. Known: a, b$"):
        lookup({"b": 1, "a": 2}, "zzz", "letter")
    with pytest.raises(UnknownNameError, match="3"):
        lookup({"b": 1}, 3, "letter")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="Known: none"):
        lookup({}, "a", "letter")
