"""What every transform must do: keep the float function, batched, compiled or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.spec import QuantSpec
from jaxq.transforms import TRANSFORMS, function_preserved
from tests.transforms.problem import problem

SCALES = [name for name, row in TRANSFORMS.items() if row.kind == "scale"]
SPLITS = [name for name, row in TRANSFORMS.items() if row.kind == "split"]
OPTIONS = {
    "smoothquant": {"alpha": "search"},
    "awq": {"points": 5, "duo": "both"},
    "split": {"ratio": 0.1},
}
INT5 = QuantSpec("int5")


def test_every_row_is_known_here():
    assert set(SCALES) | set(SPLITS) == set(TRANSFORMS)
    assert all(row.name == name for name, row in TRANSFORMS.items())
    assert set(OPTIONS) == set(TRANSFORMS)


def proposals(name, case, **options):
    row = TRANSFORMS[name]
    run = functools.partial(row.candidates, **(options or OPTIONS[name]))
    return run(case.arrays, *case.statistics(row), 16)


@pytest.mark.parametrize("name", SCALES)
def test_scales_keep_the_float_function(name, rng):
    case = problem(rng)
    scales = np.asarray(proposals(name, case), np.float64)
    assert scales.shape[1:] == (48,)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    for s in scales:
        for w in case.weights:
            want = case.x @ w
            np.testing.assert_allclose(
                (case.x / s) @ (s[:, None] * w), want, rtol=0, atol=1e-10
            )
            w = jnp.asarray(w, jnp.float32)
            s32 = jnp.asarray(s, jnp.float32)
            assert function_preserved(w, w * s32[:, None], scale=s32)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("block", ["tensor", "channel", 16])
def test_splits_keep_the_float_function(name, block, rng):
    case = problem(rng, outputs=(16,))
    spec = QuantSpec("int5", block)
    with jax.enable_x64(True):
        w = jnp.asarray(case.weights[0])
        rows, index = TRANSFORMS[name].candidates(w, spec, **OPTIONS[name])
        assert function_preserved(w, rows, index=index, tolerance=1e-13)
        assert rows.dtype == np.float64
    assert len(index) > 48
    got = case.x[:, np.asarray(index)] @ np.asarray(rows)
    np.testing.assert_allclose(got, case.x @ case.weights[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_equals_eager_and_a_stack_its_parts(name, rng):
    case = problem(rng, outputs=(16,), stack=(3,))
    row, options = TRANSFORMS[name], OPTIONS[name]
    traces = 0

    def run(w, *seen):
        nonlocal traces
        traces += 1
        if row.kind == "split":
            return row.candidates(w, INT5, **options)
        return row.candidates((w,), *seen, 16, **options)

    seen = case.statistics(row)
    compiled = jax.jit(run)
    together = compiled(*case.arrays, *seen)
    compiled(case.arrays[0] + 1, *seen)
    assert traces == 1
    axis = 1 if row.kind == "scale" else 0
    for i in range(3):
        alone = run(case.arrays[0][i], *(a[i] for a in seen))
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(
                a, np.take(np.asarray(b), i, axis), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", SCALES)
def test_dead_channels_keep_their_scale(name, rng):
    case = problem(rng)
    case.x[:, 5] = 0
    for w in case.weights:
        w[9] = 0
    scales = np.asarray(proposals(name, case))
    assert (scales[:, 5] == 1).all()
    assert np.isfinite(scales).all()
    case.x[:] = 0
    assert (np.asarray(proposals(name, case)) == 1).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smoothquant", {"alpha": 1.5}, "alpha=1.5 must be a number from 0 to 1"),
        ("smoothquant", {"alpha": "best"}, "alpha='best' must be .* or 'search'"),
        ("smoothquant", {"alpha": True}, "alpha=True must be"),
        ("awq", {"points": 0}, "points=0 must be a whole number from 1"),
        ("awq", {"points": 2.5}, "points=2.5 must be"),
        ("awq", {"duo": "maybe"}, "duo='maybe' must be True, False or 'both'"),
    ],
)
def test_bad_options(name, options, message, rng):
    with pytest.raises(ValueError, match=message):
        proposals(name, problem(rng), **options)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_bad_ratio(ratio):
    with pytest.raises(ValueError, match=f"ratio={ratio} must lie between 0 and 1"):
        TRANSFORMS["split"].candidates(jnp.ones((4, 2)), INT5, ratio=ratio)
