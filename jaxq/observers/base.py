"""What an observer is: three pure functions over a state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Observer(NamedTuple):
    """A statistic of an activation, accumulated batch by batch.

    Attributes:
        init: from an abstract activation to an empty state (a pytree of arrays).
        update: from (state, activation) to the state with that batch in it.
        merge: from two states to the state of both their batches; associative and
            commutative, so data-parallel calibration merges in any order.
    """

    init: Callable[[jax.ShapeDtypeStruct], Any]
    update: Callable[[Any, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
