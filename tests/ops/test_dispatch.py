"""The table of kernels: the first that takes a product runs; the record says why."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import ops
from jaxq.quantize import quantize
from jaxq.relayout import relayout
from jaxq.spec import QuantSpec

MATMUL = (((1,), (0,)), ((), ()))
NAMES = [kernel.name for kernel in ops.KERNELS]


def choice_of(x, q, numbers=MATMUL):
    found = []
    jax.eval_shape(lambda x, q: found.append(ops.dot_general(x, q, numbers)[1]), x, q)
    return found[0]


def weight(spec, shape=(64, 16), axis=0, **fields):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, spec, axis), w)
    return dataclasses.replace(q, **fields)


def rows(n, inner=64):
    return jax.ShapeDtypeStruct((n, inner), jnp.float32)


def test_the_last_kernel_takes_everything():
    assert NAMES[-1] == "xla.dequantize_dot"
    assert len(set(NAMES)) == len(NAMES)
    last = ops.KERNELS[-1]
    assert {"cpu", "gpu", "tpu"} == set(last.backends)
    q = weight(QuantSpec("nf4", 16, center=True), activation=QuantSpec("fp8_e4m3"))
    assert choice_of(rows(5), q).kernel == last.name


@pytest.mark.parametrize(
    ("n", "spec", "activation", "kernel"),
    [
        (512, QuantSpec("int8"), QuantSpec("int8", "token"), "xla.int8_dot"),
        (
            64,
            QuantSpec("int4", 32),
            QuantSpec("int8", "token"),
            "xla.integer_tiled_dot",
        ),
        (64, QuantSpec("int4", 32), None, "xla.tiled_dot"),
        (64, QuantSpec("nf4", 32), QuantSpec("int8", "token"), "xla.tiled_dot"),
        (64, QuantSpec("int4", 32, center=True), None, "xla.dequantize_dot"),
    ],
    ids=str,
)
def test_who_takes_what(n, spec, activation, kernel):
    choice = choice_of(rows(n), weight(spec, activation=activation))
    assert choice.kernel == kernel
    # everyone before it in the table said why not
    assert [name for name, _ in choice.declined] == NAMES[: NAMES.index(kernel)]
    assert all(reason for _, reason in choice.declined)


def test_reasons_name_the_cause():
    reasons = dict(choice_of(rows(64), weight(QuantSpec("nf4", 32))).declined)
    assert reasons["xla.integer_tiled_dot"] == "the activation stays float"
    q = weight(QuantSpec("nf4", 32), activation=QuantSpec("int8", "token"))
    reasons = dict(choice_of(rows(64), q).declined)
    assert reasons["xla.integer_tiled_dot"] == "the weight is nf4, not an integer"
    assert reasons["xla.int8_dot"] == "the weight is not int8"
    q = weight(QuantSpec("int8", 32, center=True))
    reasons = dict(choice_of(rows(64), q).declined)
    assert reasons["xla.tiled_dot"] == "the weight has an offset"


def test_relaid_codes_run_in_plain_xla_too():
    q = jax.eval_shape(lambda q: relayout(q, "tpu"), weight(QuantSpec("int4", 32)))
    assert choice_of(rows(64), q).kernel == "xla.tiled_dot"


def test_a_view_that_fails_is_recorded():
    choice = choice_of(rows(3), weight(QuantSpec("int4", 16), axis=1))
    assert choice.kernel == "dequantize"
    assert choice.declined == (("view", "the packed axis is not contracted here"),)


def test_a_record_is_hashable_and_made_while_tracing(rng):
    q = jax.jit(lambda w: quantize(w, QuantSpec("int4", 32)))(
        rng.standard_normal((64, 16)).astype(np.float32)
    )
    traced = choice_of(rows(3), q)
    _, ran = ops.dot_general(jnp.ones((3, 64), jnp.float32), q, MATMUL)
    assert hash(traced) == hash(ran)
    assert traced == ran
