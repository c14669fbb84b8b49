"""Observers: statistics of activations as pure ``init / update / merge`` triples."""

from jaxq.observers.base import Observer as Observer
from jaxq.observers.minmax import Range as Range
from jaxq.observers.minmax import minmax as minmax
