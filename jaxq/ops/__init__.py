"""What an operation does with a `QTensor`: normalize, pick a kernel, run it."""

from jaxq.ops.conv import conv_general_dilated as conv_general_dilated
from jaxq.ops.dispatch import KERNELS as KERNELS
from jaxq.ops.dot_general import dot_general as dot_general
from jaxq.ops.gather import gather as gather
from jaxq.ops.patches import Patches as Patches
from jaxq.ops.problem import Choice as Choice
from jaxq.ops.ragged_dot import ragged_dot as ragged_dot
