"""`Use`: one meeting of a parameter and an operation, seen while replaying."""

import dataclasses

import jax

from jaxq.ops import Choice

SITE_OPS = ("dot_general", "ragged_dot", "conv_general_dilated", "gather")


@dataclasses.dataclass(frozen=True)
class Use:
    """Which operation consumed a parameter, and how.

    Attributes:
        path: the parameter's path.
        op: the operation, by the name of its primitive.
        contracting: the parameter's own axes that are summed over (for a gather: the
            axes of a gathered row); None when the operation is no product.
        stacked: the parameter's axes that enclosing loops, indices or batch dimensions
            enumerate.
        activation: the other operand, or None.
        choice: the kernel that ran (quantized parameters only).
        window: of a convolution, the contracted axes that are positions in its window;
            the others are channels.
        groups: of a convolution, into how many groups its features fall.
    """

    path: str
    op: str
    contracting: tuple[int, ...] | None = None
    stacked: tuple[int, ...] = ()
    activation: jax.ShapeDtypeStruct | None = None
    choice: Choice | None = None
    window: tuple[int, ...] = ()
    groups: int = 1

    @property
    def is_site(self) -> bool:
        """Whether the operation is one that quantization is about."""
        return self.op in SITE_OPS and bool(self.contracting)
