"""The table of transforms, one row each."""

from jaxq.transforms.awq import awq
from jaxq.transforms.base import Transform
from jaxq.transforms.smoothquant import smoothquant
from jaxq.transforms.split import split

TRANSFORMS: dict[str, Transform] = {
    "smoothquant": Transform("smoothquant", "scale", ("absmax",), smoothquant),
    "awq": Transform("awq", "scale", ("magnitude", "tokens"), awq),
    "split": Transform("split", "split", (), split),
}
