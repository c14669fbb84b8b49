"""Which tensors make up a layer is told by what is there."""

import pytest

from jaxq.codecs.source import parts_of

SUFFIXES = ("weight", "weight_scale", "weight_zero_point")


@pytest.mark.parametrize(
    ("there", "parts"),
    [
        (("weight", "weight_scale"), ("weight", "weight_scale")),
        (("weight_zero_point", "weight_scale"), ("weight_scale", "weight_zero_point")),
        (("weight", "bias"), ()),  # a float layer
        (("weight", "weight_zero_point"), ()),  # what was left over beside one
        ((), ()),
    ],
)
def test_a_layer_without_its_sign_is_float(there, parts):
    source = {f"mlp.up.{suffix}" for suffix in there} | {"mlp.weight_scale"}
    found = parts_of(source, "mlp.up", SUFFIXES, sign="weight_scale")
    assert found == tuple(f"mlp.up.{suffix}" for suffix in parts)
