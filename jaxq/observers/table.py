"""The table of observers, one row each."""

from collections.abc import Callable

from jaxq.observers.absmax import absmax
from jaxq.observers.aciq import aciq
from jaxq.observers.base import Observer
from jaxq.observers.channel_absmax import channel_absmax
from jaxq.observers.gram import gram
from jaxq.observers.histogram_kl import histogram_kl
from jaxq.observers.histogram_mse import histogram_mse
from jaxq.observers.magnitude import magnitude
from jaxq.observers.minmax import minmax
from jaxq.observers.moving_average import moving_average
from jaxq.observers.percentile import percentile
from jaxq.observers.reservoir import reservoir

# The first seven have `bounds`: a static activation scale can be made of them.
OBSERVERS: dict[str, Callable[..., Observer]] = {
    "absmax": absmax,
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "histogram_mse": histogram_mse,
    "histogram_kl": histogram_kl,
    "aciq": aciq,
    "gram": gram,
    "magnitude": magnitude,
    "channel_absmax": channel_absmax,
    "reservoir": reservoir,
}
