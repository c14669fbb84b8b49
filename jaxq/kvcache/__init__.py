"""Caches of keys and values: pytrees of static shape, float or quantized."""

from jaxq.kvcache.crossed import CrossCache as CrossCache
from jaxq.kvcache.crossed import cross_cache as cross_cache
from jaxq.kvcache.explain import CacheExplanation as CacheExplanation
from jaxq.kvcache.explain import explain_cache as explain_cache
from jaxq.kvcache.floating import KVCache as KVCache
from jaxq.kvcache.floating import LayerCache as LayerCache
from jaxq.kvcache.positions import PADDING as PADDING
from jaxq.kvcache.quantized import QuantizedCache as QuantizedCache
from jaxq.kvcache.quantized import QuantizedLayer as QuantizedLayer
from jaxq.kvcache.table import CACHES as CACHES
from jaxq.kvcache.table import FLOAT as FLOAT
from jaxq.kvcache.table import Cache as Cache
from jaxq.kvcache.table import cache_bytes as cache_bytes
from jaxq.kvcache.table import empty_cache as empty_cache
