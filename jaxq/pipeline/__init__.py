"""From float parameters to quantized ones: plan, calibrate, solve."""

from jaxq.pipeline.evidence import Evidence as Evidence
from jaxq.pipeline.journal import Journal as Journal
from jaxq.pipeline.observe import calibrate as calibrate
from jaxq.pipeline.quantize import Quantized as Quantized
from jaxq.pipeline.quantize import dequantize_params as dequantize_params
from jaxq.pipeline.quantize import quantize_params as quantize_params
from jaxq.pipeline.quantize import quantize_with_evidence as quantize_with_evidence
from jaxq.pipeline.run import Calibration as Calibration
from jaxq.pipeline.run import Progress as Progress
from jaxq.pipeline.run import run_plan as run_plan
