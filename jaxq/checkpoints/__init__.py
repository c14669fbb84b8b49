"""Checkpoints: jaxq's own (`save`, `load`, `inspect`), and those of other libraries.

Models larger than memory are read tensor by tensor (`LazyArray`, in `huggingface`
`lazy_tensors`) and written step by step (`open_stream`).
"""

from jaxq.checkpoints.errors import BusyError as BusyError
from jaxq.checkpoints.errors import CheckpointError as CheckpointError
from jaxq.checkpoints.errors import CorruptError as CorruptError
from jaxq.checkpoints.errors import ExistsError as ExistsError
from jaxq.checkpoints.errors import MismatchError as MismatchError
from jaxq.checkpoints.errors import MissingFileError as MissingFileError
from jaxq.checkpoints.errors import UnsupportedError as UnsupportedError
from jaxq.checkpoints.errors import VersionError as VersionError
from jaxq.checkpoints.errors import WriteError as WriteError
from jaxq.checkpoints.identity import file_identity as file_identity
from jaxq.checkpoints.lazy import LazyArray as LazyArray
from jaxq.checkpoints.lazy import LazyStack as LazyStack
from jaxq.checkpoints.loading import load as load
from jaxq.checkpoints.loading import load_abstract as load_abstract
from jaxq.checkpoints.manifest import is_jaxq_checkpoint as is_jaxq_checkpoint
from jaxq.checkpoints.saving import save as save
from jaxq.checkpoints.stored import Stored as Stored
from jaxq.checkpoints.stream import StreamWriter as StreamWriter
from jaxq.checkpoints.stream import open_stream as open_stream
from jaxq.checkpoints.summary import Summary as Summary
from jaxq.checkpoints.summary import inspect as inspect
