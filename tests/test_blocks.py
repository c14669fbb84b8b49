import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.blocks import block_axes, block_shape, grid_shape, spread, to_blocks
from tests import oracle


@pytest.mark.parametrize(
    ("block", "shape", "contracting", "stacked", "want"),
    [
        ("tensor", (6, 4), (0,), (), (6, 4)),
        ("tensor", (2, 6, 4), (1,), (0,), (1, 6, 4)),
        ("channel", (6, 4), (0,), (), (6, 1)),
        ("channel", (6, 4, 5), (0, 2), (), (6, 1, 5)),
        ("token", (6, 4), (1,), (), (1, 4)),
        (32, (128, 4), (0,), (), (32, 1)),
        (32, (3, 128, 4), (1,), (0,), (1, 32, 1)),
        (256, (128, 4), (0,), (), (128, 1)),
        # several contracted axes: a group fills the last one, then the one before
        (32, (8, 16, 4), (0, 1), (), (2, 16, 1)),
        (8, (8, 16, 4), (0, 1), (), (1, 8, 1)),
        ((128, 64), (256, 256), (0,), (), (128, 64)),
        ((128, 64), (256, 256), (1,), (), (64, 128)),
        ((128, 128), (100, 70), (0,), (), (100, 70)),
        ((16, 8), (2, 64, 64), (1,), (0,), (1, 16, 8)),
    ],
)
def test_block_shape(block, shape, contracting, stacked, want):
    assert block_shape(block, shape, contracting, stacked) == want


def test_a_tile_without_a_free_axis():
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(8,\).*contracts \(0,\)"):
        block_shape((4, 4), (8,), (0,))


@pytest.mark.parametrize(
    ("shape", "contracting"), [((8, 6), (0, 1)), ((12, 20, 3), (0, 1))]
)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 10, 12, 20, 40, 60])
def test_a_group_over_several_axes_never_exceeds_its_size(shape, contracting, group):
    """A scale serves at most ``group`` elements."""
    block = block_shape(group, shape, contracting)
    assert np.prod(block) <= group
    assert all(1 <= b <= n for b, n in zip(block, shape, strict=True))


def test_block_maxima_of_a_ragged_tile():
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    blocks = to_blocks(jnp.asarray(x), (2, 3))
    assert blocks.shape == (3, 2, 3, 3)
    assert grid_shape(x.shape, (2, 3)) == (3, 3)
    want = [[x[i : i + 2, j : j + 3].max() for j in (0, 3, 6)] for i in (0, 2, 4)]
    np.testing.assert_array_equal(blocks.max(block_axes(2)), want)


def test_padding_takes_the_fill_value():
    blocks = to_blocks(jnp.ones(5, jnp.float32), (4,), fill=-7.0)
    np.testing.assert_array_equal(blocks, [[1, 1, 1, 1], [1, -7, -7, -7]])


@pytest.mark.parametrize(
    ("shape", "block"),
    [((7,), (3,)), ((4, 6), (1, 2)), ((5, 7), (2, 3)), ((3, 4, 5), (3, 1, 4))],
)
def test_spread_repeats_each_block(shape, block):
    grid = grid_shape(shape, block)
    values = np.arange(np.prod(grid), dtype=np.float32).reshape(grid)
    got = spread(jnp.asarray(values), block, shape)
    want = oracle.spread(values, block, shape)
    # an axis of one block may be left to broadcasting
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
