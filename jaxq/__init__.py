"""Quantize any JAX model, prove what it cost, and run it fast."""

from jaxq.checkpoints import CheckpointError as CheckpointError
from jaxq.checkpoints import load as load
from jaxq.checkpoints import save as save
from jaxq.evaluate import perplexity as perplexity
from jaxq.lift import Explanation as Explanation
from jaxq.lift import Site as Site
from jaxq.lift import explain as explain
from jaxq.lift import quantized as quantized
from jaxq.lift import sites as sites
from jaxq.lm import LM as LM
from jaxq.lm import generate as generate
from jaxq.lm import load_model as load_model
from jaxq.pipeline import calibrate as calibrate
from jaxq.pipeline import dequantize_params as dequantize_params
from jaxq.pipeline import quantize_params as quantize_params
from jaxq.plan import Plan as Plan
from jaxq.plan import plan as plan
from jaxq.presets import PRESETS as PRESETS
from jaxq.qtensor import QTensor as QTensor
from jaxq.quantize import dequantize as dequantize
from jaxq.quantize import fake_quant as fake_quant
from jaxq.quantize import quantize as quantize
from jaxq.recipe import Recipe as Recipe
from jaxq.recipe import Rule as Rule
from jaxq.spec import QuantSpec as QuantSpec
