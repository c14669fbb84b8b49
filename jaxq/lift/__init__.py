"""The lift: trace any JAX function, find its weights, run it with quantized ones."""

from jaxq.lift.explain import Explanation as Explanation
from jaxq.lift.explain import explain as explain
from jaxq.lift.quantized import quantized as quantized
from jaxq.lift.sites import Site as Site
from jaxq.lift.sites import parameter_uses as parameter_uses
from jaxq.lift.sites import sites as sites
from jaxq.lift.taps import product_tapped as product_tapped
from jaxq.lift.taps import tapped as tapped
from jaxq.lift.use import Use as Use
