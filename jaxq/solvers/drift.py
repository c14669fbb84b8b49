"""The quantized prefix moves the activations: what GPTQ can do about it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.solvers.hessian import Factor
from jaxq.solvers.order import Order


class Drift(NamedTuple):
    """How far the activations moved, and how much of it is made up for.

    Attributes:
        moved: ``float32[K, K]``, ``D = Σ (x_float − x) xᵀ``, in units of the mean
            diagonal of the Hessian.
        alpha: the share.
    """

    moved: jax.Array
    alpha: float

    def feedback(self, f: Factor, order: Order) -> jax.Array:
        """Return what GPTAQ feeds back targets by, ``α tril(M⁻ᵀ Dᵀ, −1)``.

        GPTAQ (Li et al. 2025, https://arxiv.org/abs/2504.02692) adds ``w_i P_{i,i+1:}``
        with ``P = α triu(D Uᵀ, 1) U``: rows to come make up for what moved under the
        rows before. Summed up over those as in `feedback.Sweep`, the last ``U`` goes.
        """
        ordered = order.take(order.take(self.moved), axis=1)
        by = lax.linalg.triangular_solve(
            f.lower, ordered.T, left_side=True, lower=True, transpose_a=True
        )
        by = self.alpha * jnp.tril(by, -1)
        return jnp.where(f.ok & jnp.all(jnp.isfinite(by)), by, jnp.float32(0))

    def target(self, weight: jax.Array, f: Factor, order: Order) -> jax.Array:
        """Return ``W + α H⁻¹ Dᵀ W``, whose output comes nearest to the float one.

        For ``α = 1`` it minimizes ``‖X W* − X_float W‖²``, the normal equations of
        Qronos (Zhang et al. 2025, https://arxiv.org/abs/2505.11695); ``H`` is damped.
        """
        moved = jnp.dot(self.moved.T, weight, precision=lax.Precision.HIGHEST)
        # H = MᵀM
        half = lax.linalg.triangular_solve(
            f.lower, order.take(moved), left_side=True, lower=True, transpose_a=True
        )
        whole = lax.linalg.triangular_solve(f.lower, half, left_side=True, lower=True)
        target = weight + self.alpha * order.back(whole)
        usable = f.ok & jnp.all(jnp.isfinite(target))
        return jnp.where(usable, target, weight)
