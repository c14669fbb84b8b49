"""Formulations in plain XLA: every backend runs them, a CPU runs them fast."""

from pallas_kernels.xla.binary_lut_dot import binary_lut_dot as binary_lut_dot
from pallas_kernels.xla.binary_tiled_dot import binary_tiled_dot as binary_tiled_dot
from pallas_kernels.xla.cached_attention import cached_attention as cached_attention
from pallas_kernels.xla.fused_dot import fused_dot as fused_dot
from pallas_kernels.xla.integer_dot import integer_dot as integer_dot
from pallas_kernels.xla.integer_dot import integer_tiled_dot as integer_tiled_dot
from pallas_kernels.xla.tiled_dot import tiled_dot as tiled_dot
