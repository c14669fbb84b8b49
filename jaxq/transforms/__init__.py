"""Transforms: other weights for another activation, and the same product of the two."""

from jaxq.transforms.awq import awq as awq
from jaxq.transforms.base import Transform as Transform
from jaxq.transforms.gram import expand_gram as expand_gram
from jaxq.transforms.gram import scale_gram as scale_gram
from jaxq.transforms.preserved import function_preserved as function_preserved
from jaxq.transforms.smoothquant import smoothquant as smoothquant
from jaxq.transforms.split import split as split
from jaxq.transforms.table import TRANSFORMS as TRANSFORMS
