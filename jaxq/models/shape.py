"""`Shape`: the sizes that every model has, whatever its architecture."""

from dataclasses import dataclass

from jaxq.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a transformer; families add what distinguishes them.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head.
        context: tokens the model was made for.
        norm_eps: added to the mean square or variance in every norm.
        rope: rotary angles, where the family rotates.
        tied: the head is the embedding transposed.
        activation: a key of `jaxq.models.activations.ACTIVATIONS`.
        windows: per layer, how many tokens back attention sees; None sees all. An
            empty tuple is None for every layer.
        init_scale: standard deviation of fresh weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int = 2048
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    activation: str = "silu"
    windows: tuple[int | None, ...] = ()
    init_scale: float = 0.02

    def window(self, layer: int) -> int | None:
        """Return how many tokens back the attention of `layer` sees; None is all."""
        return self.windows[layer] if self.windows else None
