"""What holds for every observer of the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq.observers import OBSERVERS, is_finite
from jaxq.spec import QuantSpec
from tests.observers.small import (
    BATCHWISE,
    SHAPE,
    TRACES,
    K,
    batch,
    close,
    init,
    merge,
    same,
    small,
    update,
)

ALL = jnp.ones(SHAPE[:2], bool)
SOME = jnp.asarray(np.random.default_rng(9).random(SHAPE[:2]) < 0.7)
WITH_BOUNDS = [name for name in OBSERVERS if small(name).bounds]
SPECS = [QuantSpec("int4", "tensor"), QuantSpec("uint4", "tensor", False)]

# Observers that share their functions and differ in bounds are tested once.
UNIQUE = list({small(name).update: name for name in OBSERVERS}.values())
every = pytest.mark.parametrize("name", UNIQUE)


def seen(name, *arrays, mask=ALL):
    state = init(name)
    for x in arrays:
        state = update(name)(state, x, mask)
    return state


@every
def test_merging_states_is_seeing_the_batches(name):
    batches = [batch(i, scale) for i, scale in enumerate((1.0, 30.0, 0.1))]
    a, b, c = (seen(name, x) for x in batches)
    close(merge(name)(a, b), merge(name)(b, a))
    whole = merge(name)(merge(name)(a, b), c)
    close(whole, merge(name)(a, merge(name)(b, c)))
    same(merge(name)(a, init(name)), a)
    same(merge(name)(init(name), a), a)
    if name != "moving_average":
        close(whole, seen(name, *batches))
        close(whole, seen(name, *reversed(batches)))
    if name not in BATCHWISE:
        together = np.concatenate(batches)
        close(whole, update(name)(init(name), together, np.ones((24, 5), bool)))
    assert whole.tokens == 3 * 40


@every
def test_compiled_is_eager(name):
    x = batch(0)
    close(small(name).update(init(name), x, SOME), seen(name, x, mask=SOME))
    # without a mask, all rows count
    close(jax.jit(small(name).update)(init(name), x), seen(name, x))


@every
def test_rows_that_are_masked_out_influence_nothing(name):
    x = batch(0)
    spoiled = [jnp.where(SOME[..., None], x, bad) for bad in (jnp.nan, jnp.inf, 9e9)]
    states = [seen(name, y, mask=SOME) for y in spoiled]
    same(states[0], states[1])
    same(states[0], states[2])
    # and it is as if they were not there
    kept = np.asarray(x)[np.asarray(SOME)]
    close(states[0], update(name)(init(name), kept, np.ones(len(kept), bool)))
    assert states[0].tokens == np.sum(SOME)


@every
def test_a_batch_without_tokens_changes_nothing(name):
    same(seen(name, batch(0), mask=~ALL), init(name))
    before = seen(name, batch(1))
    same(update(name)(before, batch(0), ~ALL), before)
    assert is_finite(init(name))


def test_a_mask_broadcasts():
    rows, full = SOME[:, :1], jnp.broadcast_to(SOME[:, :1], SHAPE[:2])
    same(seen("gram", batch(0), mask=rows), seen("gram", batch(0), mask=full))


@every
def test_stacked_states_scanned_over_batches_are_those_of_the_layers(name):
    xs = jnp.stack([jnp.stack([batch(i), batch(i + 2), batch(i + 4)]) for i in (0, 1)])
    masks = jnp.stack([ALL, SOME, ~ALL])

    def step(states, x):
        return jax.vmap(small(name).update)(states, x, masks), None

    empty = jax.tree.map(lambda a: jnp.stack([a] * 3), init(name))
    stacked, _ = jax.device_get(
        jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(empty, xs)
    )
    for i in range(3):
        alone = jax.tree.map(lambda a, i=i: a[i], stacked)
        close(alone, seen(name, *xs[:, i], mask=masks[i]))
    np.testing.assert_array_equal(stacked.tokens, [80, 2 * np.sum(SOME), 0])
    assert is_finite(stacked).shape == (3,)


@every
def test_the_second_call_is_not_compiled(name):
    state = seen(name, batch(0))
    before = TRACES[name]
    update(name)(merge(name)(state, state), batch(1), SOME)
    assert TRACES[name] == before > 0


@every
def test_narrow_inputs_are_widened_first(name):
    x = batch(0, scale=300.0).astype(jnp.float16)
    assert jnp.max(jnp.abs(x)) > 256  # whose square float16 does not hold
    state = update(name)(init(name), x, ALL)
    close(state, seen(name, x.astype(jnp.float32)))
    assert is_finite(state)


@functools.cache
def mesh(kind):
    return Mesh(np.asarray(jax.devices()), ("data",), axis_types=(kind,))


def sharded(name, kind):
    place = NamedSharding(mesh(kind), P("data"))
    x, mask = jax.device_put(batch(0), place), jax.device_put(SOME, place)
    return update(name)(init(name), x, mask)


@every
def test_sharded_over_the_batch_is_unsharded(name):
    close(sharded(name, AxisType.Auto), seen(name, batch(0), mask=SOME))


@pytest.mark.parametrize("name", ["minmax", "percentile", "gram", "reservoir"])
def test_so_it_is_on_a_mesh_with_explicit_axes(name):
    close(sharded(name, AxisType.Explicit), seen(name, batch(0), mask=SOME))


@every
def test_states_of_devices_merge_to_one_pass(name):
    def alone(state, x, mask):
        state = small(name).update(state, x, mask)
        return jax.tree.map(lambda a: a[None], state)

    on_devices = jax.shard_map(
        alone,
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    stacked = jax.device_get(jax.jit(on_devices)(init(name), batch(0), SOME))
    states = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(8)]
    merged = functools.reduce(merge(name), states)
    assert merged.tokens == np.sum(SOME)
    if name not in BATCHWISE:
        close(merged, seen(name, batch(0), mask=SOME))
        return
    each = zip(batch(0)[:, None], SOME[:, None], strict=True)
    one_by_one = [update(name)(init(name), *rows) for rows in each]
    close(merged, functools.reduce(merge(name), one_by_one))


@every
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_seen(name, bad):
    x = batch(0).at[3, 2, 1].set(bad)
    state = seen(name, batch(1), x, batch(2))
    assert is_finite(seen(name, batch(1), batch(2)))
    assert not is_finite(state)
    assert not is_finite(merge(name)(seen(name, batch(3)), state))


@pytest.mark.parametrize("name", WITH_BOUNDS)
def test_without_finite_data_there_is_no_range(name):
    find = bounds(name, SPECS[0])
    bad = batch(0).at[3, 2, 1].set(jnp.nan)
    assert np.isnan(find(init(name))).all()
    assert np.isnan(find(seen(name, bad))).all()


@functools.cache
def bounds(name, spec):
    return jax.jit(functools.partial(small(name).bounds, spec=spec))


@pytest.mark.parametrize("spec", SPECS, ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", WITH_BOUNDS)
def test_bounds_lie_within_what_was_seen(name, spec):
    x = [batch(0), batch(1), np.abs(batch(2)), np.zeros(SHAPE, np.float32)]
    states = jax.device_get([seen(name, y) for y in x])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    low, high = jax.device_get(jax.vmap(bounds(name, spec))(stacked))
    assert low.shape == high.shape == (4,)
    largest = np.abs(x).max(axis=(1, 2, 3))
    assert np.all(-largest <= low)
    assert np.all(low <= high)
    assert np.all(high <= largest)
    assert np.all(high[:3] > 0)
    assert low[3] == high[3] == 0
    if spec == SPECS[0]:
        alone = bounds(name, spec)(states[1])
        np.testing.assert_allclose(alone, (low[1], high[1]), rtol=1e-6)


def test_only_ranges_have_bounds():
    assert set(OBSERVERS) - set(WITH_BOUNDS) == {
        "gram",
        "magnitude",
        "channel_absmax",
        "reservoir",
    }


@every
def test_a_mask_of_the_wrong_kind_is_refused(name):
    step = functools.partial(jax.eval_shape, small(name).update)
    with pytest.raises(ValueError, match=r"int32.*bool.*mask != 0"):
        step(init(name), batch(0), ALL.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"\(8, 5, 6\).*broadcast to \(8, 5\)"):
        step(init(name), batch(0), jnp.ones(SHAPE, bool))


@pytest.mark.parametrize("name", ["gram", "magnitude", "channel_absmax", "reservoir"])
def test_other_features_are_refused(name):
    with pytest.raises(ValueError, match="call init with the shape"):
        jax.eval_shape(small(name).update, init(name), jnp.ones((2, K + 1)))
