"""Checkpoints of other libraries: one codec per format, in one table.

A codec reads the tensors of a weight into `Unpacked`, plain arrays of codes, scales and
zero points, from which a `QTensor` is packed; and writes them back from it.
"""

from jaxq.codecs.reading import Checkpoint as Checkpoint
from jaxq.codecs.reading import Leaf as Leaf
from jaxq.codecs.reading import find_config as find_config
from jaxq.codecs.reading import find_gguf as find_gguf
from jaxq.codecs.reading import open_checkpoint as open_checkpoint
from jaxq.codecs.reading import open_model as open_model
from jaxq.codecs.reading import read_leaves as read_leaves
from jaxq.codecs.reading import read_params as read_params
from jaxq.codecs.table import CODECS as CODECS
