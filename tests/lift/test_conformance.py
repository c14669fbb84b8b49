"""The lift against every row of `cases.CASES`.

The oracle is always the same: the float function, run on dequantized weights.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

import jaxq
from jaxq import QTensor, QuantSpec
from tests.lift.cases import (
    CASES,
    PRODUCTS,
    VIEWS,
    Case,
    Example,
    matmul,
    normal,
    shared_jit_helper,
)

SPECS = {
    "int8-channel": QuantSpec("int8"),
    "uint4-group32": QuantSpec("uint4", block=32, symmetric=False),
    "nf4-group64": QuantSpec("nf4", block=64),
    # 24 divides none of the axes: the last group is short.
    "int3-group24": QuantSpec("int3", block=24),
}
INT8 = SPECS["int8-channel"]

# Both sides multiply the same numbers; they differ in where the scale is applied and
# in the order of sums, so by a few roundings of the narrowest dtype on the way.
ROUNDINGS = {"float32": 64, "bfloat16": 2}

# The functions are tiny, so this file's time is compile time: optimize little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled_quantize = jit(jaxq.quantize, static_argnums=(1, 2))
compiled_dequantize = jit(jaxq.dequantize)

# Codebooks matter where products are computed, short groups where views cut them; where
# only the way to a weight differs (loops, trees, libraries), two formats are enough.
PLACES = {
    "int8-channel": CASES,
    "uint4-group32": CASES,
    "nf4-group64": PRODUCTS,
    "int3-group24": (*PRODUCTS, *VIEWS),
}
PAIRS = [
    pytest.param(case, SPECS[name], id=f"{case.name}-{name}")
    for name, cases in PLACES.items()
    for case in cases
]
cases_with_known_sites = pytest.mark.parametrize(
    "case", [c for c in CASES if c.sites is not None], ids=lambda case: case.name
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# ------------------------------------------------------------------------ calling them


def is_qtensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | QTensor)


def is_float(leaf: Any) -> bool:
    return not is_qtensor(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


@dataclass(frozen=True, eq=False)
class Call:
    """A call with its arrays laid open: `self(arrays)` runs it, transformably."""

    fn: Any
    leaves: tuple[Any, ...]
    tree: Any

    @classmethod
    def of(cls, fn: Any, example: Example, params: Any) -> "Call":
        everything = (params, example.args, dict(example.kwargs))
        leaves, tree = jax.tree.flatten(everything, is_leaf=is_qtensor)
        return cls(fn, tuple(leaves), tree)

    @property
    def arrays(self) -> list[Any]:
        return [leaf for leaf in self.leaves if is_array(leaf)]

    def __call__(self, arrays: list[Any]) -> Any:
        fresh = iter(arrays)
        leaves = [next(fresh) if is_array(leaf) else leaf for leaf in self.leaves]
        params, args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return self.fn(params, *args, **kwargs)

    def number(self, varied: list[int], values: list[Any]) -> jax.Array:
        """One number from every float result, with the `varied` arrays replaced."""
        arrays = self.arrays
        for i, value in zip(varied, values, strict=True):
            arrays[i] = value
        total = jnp.float32(0)
        for out in jax.tree.leaves(self(arrays)):
            if jnp.issubdtype(jnp.result_type(out), jnp.floating):
                weights = jnp.linspace(-1.0, 1.0, out.size).reshape(out.shape)
                total += jnp.sum(out.astype(jnp.float32) * weights)
        return total


def parameter_name(path: str) -> str:
    """An NNX state wraps each array in a Variable with one child, called value."""
    return path.removesuffix("/value")


@cache
def float_result(case: Case) -> Any:
    """What the float function returned before anything was quantized."""
    fn, params, args, kwargs = case.example()
    return fn(params, *args, **kwargs)


@cache
def quantized_params(case: Case, spec: QuantSpec) -> Any:
    axes = case.axes()
    float_result(case)

    def leaf(path: Any, value: Any) -> Any:
        name = parameter_name(keystr(path, simple=True, separator="/"))
        return compiled_quantize(value, spec, axes[name]) if name in axes else value

    params = tree_map_with_path(leaf, case.example().params)
    found = [q for q in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(q)]
    assert len(found) == len(axes) > 0
    return params


@cache
def dequantized_params(case: Case, spec: QuantSpec) -> Any:
    def leaf(value: Any) -> Any:
        return compiled_dequantize(value) if is_qtensor(value) else value

    return jax.tree.map(leaf, quantized_params(case, spec), is_leaf=is_qtensor)


def quantized_call(case: Case, spec: QuantSpec) -> Call:
    example = case.example()
    return Call.of(jaxq.quantized(example.fn), example, quantized_params(case, spec))


def reference_call(case: Case, spec: QuantSpec) -> Call:
    example = case.example()
    return Call.of(example.fn, example, dequantized_params(case, spec))


@cache
def compiled_reference(case: Case) -> Any:
    """The float function, compiled once for all specs."""
    return jit(reference_call(case, INT8))


# ------------------------------------------------------------------------ comparing


def narrowest(call: Call) -> np.dtype:
    """The float dtype with the fewest bits among all that the call computes."""
    jaxpr = jax.make_jaxpr(call)(call.arrays)
    values = [v for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars)]
    dtypes = {np.dtype(v.aval.dtype) for v in values if _is_plain_float(v.aval)}
    return min(dtypes, key=lambda d: d.itemsize, default=np.dtype("float32"))


def _is_plain_float(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def assert_close(actual: Any, expected: Any, dtype: np.dtype) -> None:
    """Same tree, same shapes and dtypes, values within a few roundings of `dtype`.

    The error is relative to the leaf's norm, or to a hundredth of the whole tree's: a
    leaf that is zero but for rounding (the gradient of a key's bias) has no digits.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    bound = ROUNDINGS[dtype.name] * float(jnp.finfo(dtype).eps)
    floats = [e for e in jax.tree.leaves(expected) if is_array(e) and is_float(e)]
    whole = np.linalg.norm([np.linalg.norm(np.asarray(e, np.float64)) for e in floats])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(e)
        assert jnp.shape(a) == jnp.shape(e)
        if not jnp.issubdtype(jnp.result_type(e), jnp.floating):
            np.testing.assert_array_equal(a, e)
            continue
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.isfinite(a).all()
        error = np.linalg.norm(a - e) / max(np.linalg.norm(e), whole / 100, 1e-30)
        assert error <= bound, f"relative error {error:.2e} above {bound:.2e}"


def assert_identical(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, also inside the jaxprs that equations carry."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


# ------------------------------------------------------------------------ the tests


@cases_with_known_sites
def test_sites(case):
    """`jaxq.sites` finds exactly the expected uses, in the parameter's own axes."""
    fn, params, args, kwargs = case.example()
    found = jaxq.sites(lambda p, *a: fn(p, *a, **kwargs), params, *args)
    stacked = {parameter_name(site.path): tuple(site.stacked) for site in found}
    keys = {(parameter_name(s.path), s.op, tuple(s.contracting)) for s in found}
    expected = {(path, *key) for path, uses in case.sites.items() for key in uses}
    assert keys == expected
    for path, axes in case.stacked.items():
        assert stacked[path] == axes


@every_case
def test_sites_need_no_weights(case):
    """The same sites on abstract shapes: nothing is computed to find them."""
    fn, params, args, kwargs = case.example()
    abstract = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if is_array(v) else v, params
    )
    concrete = jaxq.sites(lambda p, *a: fn(p, *a, **kwargs), params, *args)
    assert jaxq.sites(lambda p, *a: fn(p, *a, **kwargs), abstract, *args) == concrete


@cases_with_known_sites
def test_plan(case):
    """A recipe reaches exactly the sites, along their axes, in every kind of tree."""
    fn, params, args, kwargs = case.example()
    if case.sites == {}:
        with pytest.raises(ValueError, match="quantizes nothing"):
            jaxq.plan(fn, params, INT8, *args, **kwargs)
        return
    planned = jaxq.plan(fn, params, INT8, *args, **kwargs).quantized
    axes = {parameter_name(row.path): tuple(row.contracting) for row in planned}
    assert set(axes) == set(case.sites)
    for path, contracting in axes.items():
        assert contracting in [key[1] for key in case.sites[path]]


@pytest.mark.parametrize(
    "name",
    [
        "transposed",
        "two-axes",
        "scan-nested",
        "none-leaves",
        "static-leaves",
        "nested-parameters",
        "nnx-linear",
        "equinox-mlp",
    ],
)
def test_quantize_params(name):
    """From the float tree to the quantized function, in the three public calls."""
    case = next(case for case in CASES if case.name == name)
    example = case.example()
    params = jaxq.quantize_params(
        example.params, "w8a16", fn=example.fn, calibration=[example.args]
    )
    found = tree_leaves_with_path(params, is_leaf=is_qtensor)
    paths = {keystr(k, simple=True, separator="/") for k, q in found if is_qtensor(q)}
    assert {parameter_name(path) for path in paths} == set(case.sites)
    reference = Call.of(example.fn, example, jaxq.dequantize_params(params))
    actual = jaxq.quantized(example.fn)(params, *example.args)
    assert_close(actual, reference(reference.arrays), narrowest(reference))


@pytest.mark.parametrize(("case", "spec"), PAIRS)
def test_output(case, spec):
    """Quantized, compiled: the float function on dequantized weights."""
    call, reference = quantized_call(case, spec), reference_call(case, spec)
    expected = compiled_reference(case)(reference.arrays)
    actual = jit(call)(call.arrays)
    assert_close(actual, expected, narrowest(reference))


@every_case
def test_without_jit(case):
    """Not compiled: the same numbers, and exactly the float function's result tree."""
    call, reference = quantized_call(case, INT8), reference_call(case, INT8)
    expected = reference(reference.arrays)
    actual = call(call.arrays)
    assert_close(actual, expected, narrowest(reference))


@every_case
def test_gradient(case):
    """The derivative in every float input is that of the dequantized function."""
    call, reference = quantized_call(case, INT8), reference_call(case, INT8)
    varied = [i for i, leaf in enumerate(call.arrays) if is_float(leaf)]
    floats = [jnp.asarray(call.arrays[i]) for i in varied]

    def derivative(of: Call) -> Any:
        number = partial(of.number, varied)
        if case.reverse:
            return jit(jax.grad(number))(floats)
        ones = [jnp.ones_like(leaf) for leaf in floats]
        return jit(lambda v: jax.jvp(number, (v,), (ones,))[1])(floats)

    actual, expected = derivative(call), derivative(reference)
    assert_close(actual, expected, narrowest(reference))


@every_case
def test_float_function_is_untouched(case):
    """Bit for bit the same before and after; `quantized` takes float leaves too."""
    fn, params, args, kwargs = case.example()
    before = float_result(case)
    call = quantized_call(case, INT8)
    jax.eval_shape(call, call.arrays)
    assert_identical(fn(params, *args, **kwargs), before)
    lifted = jaxq.quantized(fn)(params, *args, **kwargs)
    assert_close(lifted, before, narrowest(reference_call(case, INT8)))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.fallback], ids=lambda case: case.name
)
def test_fallback_is_explained(case):
    """What has no fused rule is listed with its parameter's path."""
    fn, _, args, _ = case.example()
    explained = str(jaxq.explain(fn, quantized_params(case, INT8), *args))
    for path in case.fallback:
        assert any(
            path in line.split() and "dequantize" in line
            for line in explained.splitlines()
        ), explained


@every_case
def test_explain_mentions_every_parameter(case):
    """No quantized parameter is passed over in silence."""
    fn, _, args, kwargs = case.example()
    told = jaxq.explain(fn, quantized_params(case, INT8), *args, **kwargs)
    paths = {row.path for row in told} | set(told.unused)
    assert {parameter_name(path) for path in paths} == set(case.axes())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.dots], ids=lambda case: case.name
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dot_parameters_are_kept(case, spec):
    """Precision and the accumulator's dtype survive, whatever kernel is picked."""
    call = quantized_call(case, spec)
    jaxpr = jax.make_jaxpr(call)(call.arrays)
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert dots
    for eqn in dots:
        for name, value in case.dots.items():
            assert eqn.params[name] == value


@pytest.mark.parametrize("float_first", [True, False])
def test_shared_jit_cache_is_not_poisoned(float_first):
    """One jitted helper serves float and quantized weights of one shape, any order."""
    fn, params, args, _ = shared_jit_helper()  # a fresh helper, in no cache yet
    mixed = {**params, "w": compiled_quantize(params["w"], SPECS["int3-group24"], (0,))}
    call = jaxq.quantized(fn)
    if float_first:
        exact = fn(params, *args)
        actual = call(mixed, *args)
    else:
        actual = call(mixed, *args)
        exact = fn(params, *args)

    def by_hand(w: Any) -> np.ndarray:
        hidden = np.tanh(np.asarray(args[0], np.float64) @ np.asarray(w, np.float64))
        return np.tanh(hidden @ np.asarray(params["v"], np.float64))

    np.testing.assert_allclose(exact, by_hand(params["w"]), atol=1e-5)
    np.testing.assert_allclose(actual, by_hand(mixed["w"].dequantize()), atol=1e-5)
    assert np.abs(by_hand(params["w"]) - actual).max() > 0.01


@pytest.mark.parametrize("transform", ["vmap", "ensemble", "scan", "jvp", "checkpoint"])
def test_under_transformations(transform):
    """`quantized(fn)` is a JAX function: transformations go around it."""
    fn, params, (x,), _ = matmul()
    w = compiled_quantize(params["w"], SPECS["uint4-group32"], (0,))
    call, expected = jaxq.quantized(fn), x @ w.dequantize()
    if transform == "vmap":
        actual = jax.vmap(call, in_axes=(None, 0))({"w": w}, x)
    elif transform == "ensemble":
        ws = normal(2, *params["w"].shape)
        w = compiled_quantize(ws, SPECS["uint4-group32"], (1,))
        expected = jnp.einsum("bd,edf->ebf", x, w.dequantize())
        actual = jax.vmap(call, in_axes=(0, None))({"w": w}, x)
    elif transform == "scan":
        actual = jax.lax.scan(lambda c, row: (c, call({"w": w}, row)), 0, x)[1]
    elif transform == "jvp":
        actual = jax.jvp(lambda h: call({"w": w}, h), (x,), (x,))[1]
    else:
        actual = jax.checkpoint(call)({"w": w}, x)
    assert_close(actual, expected, np.dtype("float32"))


def test_lookup_out_of_range():
    """An index past the end reads what the float function reads: NaN."""
    q = compiled_quantize(normal(32, 64), SPECS["uint4-group32"], (1,))
    tokens = jnp.array([0, 31, 32, -1])

    def fn(table, t):
        return jnp.take(table, t, axis=0)

    actual, expected = jaxq.quantized(fn)(q, tokens), fn(q.dequantize(), tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert np.isnan(expected[2]).all()


def test_scan_over_stacked_qtensors():
    """A stacked QTensor is scanned from outside, one layer's QTensor at a time."""
    ws = normal(3, 64, 64)
    stacked = compiled_quantize(ws, SPECS["uint4-group32"], (1,))
    call = jaxq.quantized(lambda w, h: jnp.tanh(h @ w))
    x = normal(2, 64, seed=5)
    actual, _ = jax.lax.scan(lambda h, w: (call(w, h), None), x, stacked)
    expected = x
    for layer in stacked.dequantize():
        expected = jnp.tanh(expected @ layer)
    assert_close(actual, expected, np.dtype("float32"))


def test_qtensors_anywhere():
    """Not only in the first argument: by position, by keyword, twice wrapped."""
    w = compiled_quantize(normal(64, 32), INT8, (0,))
    v = compiled_quantize(normal(32, 64), INT8, (0,))
    x = normal(3, 64, seed=9)
    call = jaxq.quantized(jaxq.quantized(lambda x, w, *, deep: (x @ w) @ deep[0]))
    expected = (x @ w.dequantize()) @ v.dequantize()
    assert_close(call(x, w, deep=[v]), expected, np.dtype("float32"))


def test_closes_over_a_tracer():
    """A function made inside another trace may use that trace's values."""
    q = compiled_quantize(normal(64, 32), INT8, (0,))

    @jax.jit
    def outer(x, c):
        call = jaxq.quantized(lambda w, h: (h @ w) * c)
        return call(q, x) + call(q, 2 * x)

    x, c = normal(3, 64, seed=9), jnp.float32(3)
    expected = 3 * c * (x @ q.dequantize())
    assert_close(outer(x, c), expected, np.dtype("float32"))


def test_abstract_parameters():
    """Shapes are enough to know the result's shape, and which kernels would run."""
    fn, _, args, _ = matmul()
    q = jax.eval_shape(lambda: jaxq.quantize(normal(64, 32), INT8, 0))
    out = jax.eval_shape(jaxq.quantized(fn), {"w": q}, *args)
    assert (out.shape, out.dtype) == ((3, 32), jnp.float32)
    assert [row.path for row in jaxq.explain(fn, {"w": q}, *args)] == ["w"]


def test_traces_once():
    """After the first call under jit, the user's Python does not run again."""
    runs = []

    def fn(p, x):
        runs.append(1)
        return x @ p["w"]

    params = {"w": compiled_quantize(normal(64, 32), INT8, (0,))}
    call = jax.jit(jaxq.quantized(fn))
    for seed in range(3):
        call(params, normal(3, 64, seed=seed))
    assert len(runs) == 1


@pytest.mark.parametrize("case", [CASES[0]], ids=lambda case: case.name)
def test_comparison_sees_a_wrong_weight(case):
    """The tolerance is tight enough: one code off by one is an error."""
    q = quantized_params(case, INT8)["w"]
    wrong = dataclasses.replace(q, codes=q.codes.at[0, 0].add(1))
    x = case.example().args[0]
    actual = jaxq.quantized(case.example().fn)({"w": wrong}, x)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(actual, x @ q.dequantize(), np.dtype("float32"))
