"""Observers: statistics of activations as pure ``init / update / merge`` triples."""

from jaxq.observers.absmax import AbsMax as AbsMax
from jaxq.observers.absmax import absmax as absmax
from jaxq.observers.aciq import Moments as Moments
from jaxq.observers.aciq import aciq as aciq
from jaxq.observers.base import Observer as Observer
from jaxq.observers.base import is_finite as is_finite
from jaxq.observers.channel_absmax import ChannelAbsMax as ChannelAbsMax
from jaxq.observers.channel_absmax import channel_absmax as channel_absmax
from jaxq.observers.gram import Gram as Gram
from jaxq.observers.gram import cross_gram as cross_gram
from jaxq.observers.gram import gram as gram
from jaxq.observers.histogram import Histogram as Histogram
from jaxq.observers.histogram_kl import histogram_kl as histogram_kl
from jaxq.observers.histogram_mse import histogram_mse as histogram_mse
from jaxq.observers.magnitude import Magnitude as Magnitude
from jaxq.observers.magnitude import magnitude as magnitude
from jaxq.observers.minmax import Range as Range
from jaxq.observers.minmax import minmax as minmax
from jaxq.observers.moving_average import AverageRange as AverageRange
from jaxq.observers.moving_average import moving_average as moving_average
from jaxq.observers.percentile import percentile as percentile
from jaxq.observers.reservoir import Reservoir as Reservoir
from jaxq.observers.reservoir import reservoir as reservoir
from jaxq.observers.table import OBSERVERS as OBSERVERS
