"""Model architectures in Flax, with no quantization code in them."""

from jaxq.models.families import FAMILIES as FAMILIES
from jaxq.models.families import find_family as find_family
from jaxq.models.family import Family as Family
from jaxq.models.family import Slot as Slot
from jaxq.models.hf_config import ConfigError as ConfigError
from jaxq.models.llama import Llama as Llama
from jaxq.models.llama import LlamaConfig as LlamaConfig
