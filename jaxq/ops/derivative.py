"""Derivatives for kernels that have none of their own, or one that costs too much."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

# of the activation and the weight: a QTensor, or one with the index of a layer
Product = Callable[[jax.Array, Any], jax.Array]


def borrow_derivative(run: Product, lender: Product, x: jax.Array, w: Any) -> jax.Array:
    """Return ``run(x, w)`` with the derivative of ``lender`` at the same place.

    Integer arithmetic has no derivative: that of the same product in floats, with the
    rounding of the activation taken as the identity, stands in for it (the
    straight-through estimator, Bengio et al. 2013).

    Args:
        run: what computes the value.
        lender: a function of about the same value, differentiable in both modes.
        x: the activation.
        w: the weight.
    """

    @jax.custom_jvp
    def product(x: jax.Array, w: Any) -> jax.Array:
        return run(x, w)

    def rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        leaves, tree = jax.tree.flatten(primals)
        changes = jax.tree.leaves(tangents)
        # only what is differentiated: the others would cost as much, to add zeros
        moving = [i for i, t in enumerate(changes) if not isinstance(t, SymbolicZero)]

        def lent(*values: jax.Array) -> jax.Array:
            known = dict(zip(moving, values, strict=True))
            parts = [known.get(i, leaf) for i, leaf in enumerate(leaves)]
            return lender(*jax.tree.unflatten(tree, parts))

        start, change = [leaves[i] for i in moving], [changes[i] for i in moving]
        return product(*primals), jax.jvp(lent, start, change)[1]

    product.defjvp(rule, symbolic_zeros=True)
    return product(x, w)
