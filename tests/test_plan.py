"""The plan: what would be done, in true bytes, without a weight being read."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxq.lift import explain
from jaxq.names import UnknownNameError
from jaxq.pipeline import quantize_params
from jaxq.plan import plan
from jaxq.presets import PRESETS
from jaxq.recipe import Recipe, Rule
from jaxq.spec import QuantSpec
from tests.small_models import filled, tiny_lm, tokens

INT8 = QuantSpec("int8")
INT4_32 = QuantSpec("int4", 32)


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(params, x):
    return x @ params["w"]


def by_path(rows):
    return {row.path: row for row in rows}


# ------------------------------------------------------------------- nothing is read


def test_shapes_are_enough_and_say_the_same_as_weights():
    fn, shapes = tiny_lm()
    from_shapes = plan(fn, shapes, "w4a16", abstract(2, 5, dtype=jnp.int32))
    assert from_shapes == plan(fn, filled(shapes), "w4a16", tokens())


def test_a_plan_of_a_model_that_fits_nowhere():
    size = 1 << 20  # 4 TB of weights
    rows = plan(product, {"w": abstract(size, size)}, "w4a16", abstract(1, size))
    assert rows.bytes_before == 4 * size**2
    assert rows.bytes_after == size**2 // 2 + (size // 64) * size * 3


def test_weights_that_are_nan_are_not_looked_at():
    assert plan(None, {"kernel": jnp.full((64, 4), jnp.nan)}, "w8a16").quantized


# ------------------------------------------------------------------------ true bytes


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["stack"])[0]


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_after_are_the_bytes_measured(name):
    # 72 is no multiple of any group, 2 layers are stacked
    shapes = {"stack": abstract(2, 72, 72, dtype=jnp.bfloat16)}
    x = jnp.ones((1, 72), jnp.bfloat16)
    (row,) = plan(stacked, shapes, name, x)
    params = filled(shapes)
    q = quantize_params(params, name, stacked, [(x,)])["stack"]
    assert (row.stacked, row.contracting) == ((0,), (1,))
    assert row.bytes_before == params["stack"].nbytes
    assert row.bytes_after == q.nbytes == sum(a.nbytes for a in jax.tree.leaves(q))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # K=128, N=64: codes + scales (+ zero points)
        (INT8, 128 * 64 + 64 * 4),
        (INT4_32, 128 * 64 // 2 + 4 * 64 * 4),
        (QuantSpec("int3", "tensor"), 128 * 64 * 3 // 8 + 4),
        (QuantSpec("uint2", 64, False, scale="float16"), 128 * 64 // 4 + 2 * 64 * 3),
        (QuantSpec("fp8_e4m3", (32, 16)), 128 * 64 + 4 * 4 * 4),
        (QuantSpec("fp4_e2m1", 32, scale="e8m0"), 128 * 64 // 2 + 4 * 64),
        # 48 groups: 128 rows are padded to 144
        (QuantSpec("int4", 48), 144 * 64 // 2 + 3 * 64 * 4),
    ],
    ids=lambda v: v.describe() if isinstance(v, QuantSpec) else None,
)
def test_bytes_of_one_matrix_by_hand(spec, expected):
    rows = plan(product, {"w": abstract(128, 64)}, spec, abstract(1, 128))
    assert (rows.bytes_before, rows.bytes_after) == (4 * 128 * 64, expected)
    assert rows.bits_per_weight == expected * 8 / (128 * 64)


def test_totals_count_what_stays_float():
    def fn(p, x):
        return x @ p["w"] + p["bias"]

    params = {"w": abstract(128, 64), "bias": abstract(64)}
    rows = plan(fn, params, INT8, abstract(1, 128))
    assert rows.bytes_before == 4 * (128 * 64 + 64)
    assert rows.bytes_after == 128 * 64 + 64 * 4 + 64 * 4
    assert rows.bits_per_weight == rows.bytes_after * 8 / (128 * 64 + 64)
    assert len(rows) == 2
    assert [row.path for row in rows.quantized] == ["w"]


# --------------------------------------------------------------------------- reasons


def test_everything_left_float_says_why():
    def fn(p, x, i):
        y = x @ p["kept"] + x @ p["w"] + p["bias"]
        return y + p["slopes"][i] + x[:, :1] @ p["row"].reshape(1, -1)

    params = {
        "w": abstract(32, 16),
        "kept": abstract(32, 16),
        "bias": abstract(16),
        "slopes": abstract(9),
        "row": abstract(16),
        "unused": abstract(32, 16),
        "count": abstract(dtype=jnp.int32),
        "key": jax.eval_shape(jax.random.key, 0),
    }
    recipe = Recipe("r", (Rule("kept"), Rule("re:[^x]*", INT8)))
    example = abstract(3, 32), abstract(dtype=jnp.int32)
    reasons = {row.path: row.reason for row in plan(fn, params, recipe, *example)}
    assert reasons.pop("w") == ""
    assert reasons == {
        "bias": "met by add, not by a product",
        "slopes": "met by add, not by a product",
        "kept": "rule 'kept' keeps it float",
        "row": "met by dot_general, along none of its axes",
        "unused": "the function does not use it",
        "count": "not a float parameter",
        "key": "not a float parameter",
    }


def test_a_lookup_of_single_numbers_is_no_table():
    def fn(p, ids):
        return p["table"][ids] @ p["w"] + p["offsets"][ids][:, None]

    params = {"table": abstract(9, 32), "w": abstract(32, 4), "offsets": abstract(9)}
    rows = by_path(plan(fn, params, "w8a16", abstract(3, dtype=jnp.int32)))
    assert rows["table"].contracting == (1,)
    assert rows["offsets"].reason == "met by gather, along none of its axes"


def test_no_rule_and_no_elements():
    params = {"a": abstract(32, 8), "b": abstract(32, 8), "empty": abstract(32, 0)}

    def fn(p, x):
        return x @ p["a"] + x @ p["b"], x @ p["empty"]

    recipe = Recipe("r", (Rule("a", INT8), Rule("empty", INT8, required=False)))
    rows = by_path(plan(fn, params, recipe, abstract(1, 32)))
    assert rows["b"].reason == "no rule matches"
    assert rows["empty"].reason == "it has no elements"
    assert [row.is_quantized for row in rows.values()] == [True, False, False]


@pytest.mark.parametrize(
    ("length", "spec", "remark"),
    [
        (100, INT4_32, "axis 0 of 100 is padded to 128 for groups of 32"),
        (100, QuantSpec("int4"), "axis 0 of 100 is padded to 104 for whole bytes"),
        (100, INT8, ""),
        (96, INT4_32, ""),
        (10, QuantSpec("int8", 4), "axis 0 of 10 is padded to 12 for groups of 4"),
    ],
)
def test_padding_is_remarked_with_both_numbers(length, spec, remark):
    rows = plan(product, {"w": abstract(length, 8)}, spec, abstract(1, length))
    assert rows.rows[0].reason == remark


def test_two_uses_that_cannot_share_blocks_are_remarked_and_true():
    def fn(p, x, y):
        return (x @ p["w"]).sum() + (y @ p["w"].T).sum() + jnp.sin(p["w"]).sum()

    x, y = abstract(2, 32), abstract(2, 16)
    (row,) = plan(fn, {"w": abstract(32, 16)}, INT8, x, y)
    assert row.contracting == (0,)  # the first product's
    assert row.reason == (
        "also met by dot_general over (1,), which dequantizes it; "
        "also met by sin, which dequantizes it"
    )
    # the replay agrees: the first product runs on codes, the others do not
    q = quantize_params({"w": jnp.ones((32, 16))}, INT8, fn, [(x, y)])
    kernels = [row.choice.kernel for row in explain(fn, q, x, y)]
    assert ["dequantize" in kernel for kernel in kernels] == [False, True, True]


# -------------------------------------------------------------- without a function


def test_without_a_function_only_the_conventions_are_known():
    params = {
        "up": {"kernel": abstract(32, 8), "bias": abstract(8)},
        "embed": {"embedding": abstract(40, 32)},
        "conv": {"kernel": abstract(3, 3, 4, 8)},
        "mine": abstract(32, 8),
        "nnx": {"kernel": {"value": abstract(32, 8)}},
    }
    rows = by_path(plan(None, params, INT8))
    quantized = {path: row.contracting for path, row in rows.items() if row.spec}
    assert quantized == {
        "up/kernel": (0,),
        "embed/embedding": (1,),
        "nnx/kernel/value": (0,),
    }
    known = "without a function only matrices named 'kernel' or 'embedding' are known"
    left = {path: row.reason for path, row in rows.items() if not row.spec}
    assert left == dict.fromkeys(["up/bias", "conv/kernel", "mine"], known)


def test_conventions_and_function_agree_on_a_linen_model():
    fn, shapes = tiny_lm()
    blind, seeing = plan(None, shapes, "w4a16"), plan(fn, shapes, "w4a16", tokens())
    for a, b in zip(blind, seeing, strict=True):
        if a.is_quantized:
            assert (a.contracting, a.bytes_after) == (b.contracting, b.bytes_after)
        elif b.is_quantized:  # three axes: only the function says which
            assert a.path.endswith("moe/experts")


# ----------------------------------------------------------------------------- table


def test_the_table_says_it_all():
    spec = QuantSpec("int4", 64, scale="bfloat16")
    rule = Rule("*", spec, QuantSpec("int8", "token"), options={"clip": "mse"})
    shapes = {"up": {"kernel": abstract(128, 64)}}
    rows = plan(None, shapes, Recipe("mine", (rule,)), group_size=32)
    assert str(rows) == (
        "up/kernel          128x64        32,768 ->       4,608  int4 g32, bfloat16 "
        "scales × int8 per token (dynamic), rtn(clip=mse)\n"
        "mine-g32: 1 of 1 parameters, 32,768 -> 4,608 bytes (7.11x smaller), "
        "4.500 bits/weight"
    )


def test_a_static_scale_is_counted():
    tensor = QuantSpec("int8", "tensor")
    recipe = Recipe("s", (Rule("*", INT8, tensor, static=True),))
    x = jnp.ones((1, 16))
    shapes = {"stack": abstract(3, 16, 16)}
    (row,) = plan(stacked, shapes, recipe, x)
    q = quantize_params(filled(shapes), recipe, stacked, [(x,)])["stack"]
    assert row.bytes_after == q.nbytes == 3 * (16 * 16 + 16 * 4 + 4)
    assert "× int8 per tensor (static)" in row.decision


# ------------------------------------------------------------------------- bad input


def refused(rules, params=None, fn=None, example=()):
    params = params or {
        "layer_0": {"kernel": abstract(32, 8), "bias": abstract(8)},
        "lm_head": {"kernel": abstract(32, 8)},
    }
    with pytest.raises(ValueError) as info:  # noqa: PT011
        plan(fn, params, Recipe("mine", rules), *example)
    return str(info.value)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*lm_haed*", "lm_head/kernel"),
        ("re:.*(lm_hed)/kernel", "lm_head/kernel"),
        ("params/layer_0/kernel", "layer_0/kernel"),
        ("layer_[1-9]/bais", "layer_0/bias"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest_path(pattern, near):
    message = refused((Rule(pattern, INT8), Rule("*", INT8)))
    assert f"rule {pattern!r} of recipe 'mine' matches no parameter" in message
    assert f"did you mean to match {near!r}?" in message
    assert "Correct the pattern, or give the rule required=False" in message
    assert "Parameters: layer_0/bias, layer_0/kernel, lm_head/kernel" in message


def test_a_rule_like_nothing_suggests_nothing():
    assert "did you mean" not in refused((Rule("*zzz*", INT8),))


def test_a_rule_that_keeps_something_float_must_match_too():
    assert "rule 'norm' of recipe" in refused((Rule("norm"), Rule("*", INT8)))
    recipe = Recipe("mine", (Rule("norm", required=False), Rule("*", INT8)))
    assert plan(None, {"kernel": abstract(8, 8)}, recipe).quantized


def test_a_rule_for_an_operation_that_never_comes():
    message = refused((Rule("*", INT8, ops=("ragged_dot",)), Rule("*", INT8)))
    assert "matches no parameter met by ragged_dot" in message


def test_a_rule_whose_parameters_are_taken_names_the_taker():
    message = refused((Rule("*", INT8), Rule("lm_head/*", INT4_32)))
    assert message.startswith("rule 'lm_head/*' of recipe 'mine' quantizes nothing")
    assert "'lm_head/kernel' is taken by an earlier rule, '*'" in message


def test_a_rule_whose_parameters_stay_float_says_why():
    message = refused((Rule("*bias", INT8), Rule("*", INT8)))
    assert "'layer_0/bias' stays float: without a function only matrices" in message


def test_what_is_quantized_already_is_refused():
    q = quantize_params({"kernel": jnp.ones((64, 8))}, "w4a16")
    with pytest.raises(ValueError, match=r"'kernel' is already quantized: QTensor"):
        plan(None, q, "w8a16")
    with pytest.raises(ValueError, match=r"call jaxq\.dequantize_params first"):
        plan(product, {"w": q["kernel"]}, "w8a16", abstract(1, 64))


@pytest.mark.parametrize("params", [{}, None, [], {"a": {}}, 3.0])
def test_a_tree_without_arrays_is_refused(params):
    with pytest.raises(ValueError, match=r"holds no arrays.*'params'"):
        plan(None, params, "w8a16")


def test_a_tree_of_another_model_is_refused_by_its_function():
    fn, _ = tiny_lm()
    with pytest.raises(Exception, match=re.escape("/embed")):
        plan(fn, {"params": {"other": abstract(3, 3)}}, "w8a16", tokens())


def test_a_rule_that_cannot_be_applied_names_the_parameter():
    spec = QuantSpec("int8", (16, 16))
    message = refused(
        (Rule("*", spec),),
        {"v": abstract(32)},
        lambda p, x: x @ p["v"],
        (abstract(4, 32),),
    )
    assert message.startswith("rule '*' cannot be applied to 'v' of shape (32,)")
    assert "an axis that is not contracted" in message


def test_a_mistyped_option_is_found_before_any_work():
    options = {"clip": "mse", "stepz": 3}
    recipe = Recipe("r", (Rule("*", INT8, options=options),))
    with pytest.raises(UnknownNameError, match="'stepz'; did you mean 'steps'"):
        plan(None, {"kernel": abstract(32, 8)}, recipe)
