import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.xla import binary_lut_dot


@pytest.mark.parametrize(("bits", "group", "offset"), [(3, 32, True), (1, 64, False)])
def test_look_ups_are_the_product_with_sums_of_signs(bits, group, offset, rng):
    rows, columns = 128, 24
    signs = rng.integers(0, 2, (bits, rows, columns))
    weights = 1 << np.arange(8)
    packed = (signs.reshape(bits, -1, 8, columns) * weights[:, None]).sum(2)
    scales = rng.uniform(0.1, 1, (bits, rows // group, columns))
    offsets = rng.standard_normal((rows // group, columns)) if offset else None
    x = rng.standard_normal((5, rows))
    # the weight, in float64
    w = np.sum((2 * signs - 1) * np.repeat(scales, group, 1), 0)
    w = w if offsets is None else w + np.repeat(offsets, group, 0)
    single = lambda a: None if a is None else jnp.asarray(a, jnp.float32)
    run = jax.jit(lambda *a: binary_lut_dot(*a, group=group))
    y = run(single(x), jnp.asarray(packed, jnp.uint8), single(scales), single(offsets))
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-4)


def test_groups_that_cut_bytes_are_refused():
    codes = jnp.zeros((1, 4, 2), jnp.uint8)
    with pytest.raises(ValueError, match="group=12 must be a multiple of 8"):
        binary_lut_dot(jnp.ones((1, 32)), codes, jnp.ones((1, 3, 2)), group=12)
