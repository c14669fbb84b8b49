"""Read the rotary settings of a `config.json`, in the spelling of transformers 4 or 5.

transformers 4 wrote `rope_theta` and `rope_scaling: {"type" | "rope_type": ...}`; 5
writes one `rope_parameters: {"rope_type": ..., "rope_theta": ...}`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxq.models.hf_config import ConfigError, Keys
from jaxq.models.rope import BENDS, Rope

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "longrope": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "short_factor",
            "long_factor",
        }
    ),
}


@dataclass(frozen=True)
class Usual:
    """What a family takes where the settings do not say it.

    Attributes:
        theta: the base.
        fraction: the share of a head that turns.
        whole: whether it can turn whole heads only.
        aliases: other names of kinds of scaling, and the usual ones.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    whole: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)


USUAL = Usual()


def read_rope(keys: Keys, context: int, head_dim: int, usual: Usual = USUAL) -> Rope:
    """Read the rotary settings, one for all layers.

    Args:
        keys: the config.
        context: tokens the model was made for.
        head_dim: the width of a head.
        usual: what the family takes where the config does not say it.

    Raises:
        ConfigError: a scaling that is not implemented, or one with unknown settings.
    """
    written = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    keys.get("rope_scaling")
    theta = keys.number("rope_theta", usual.theta) or usual.theta
    share = keys.number("partial_rotary_factor", usual.fraction) or usual.fraction
    usual = replace(usual, theta=theta, fraction=share)
    original = keys.get("original_max_position_embeddings")
    return parse_rope(written, context, head_dim, usual, original)


def parse_rope(
    written: Mapping[str, Any],
    context: int,
    head_dim: int,
    usual: Usual = USUAL,
    original: int | None = None,
) -> Rope:
    """Return what a config's rotary settings mean.

    Args:
        written: the settings.
        context: tokens the model was made for.
        head_dim: the width of a head.
        usual: what is taken where they do not say it.
        original: tokens the model was first trained on, if it stands elsewhere.

    Raises:
        ConfigError: a scaling that is not implemented, or one with unknown settings.
    """
    settings = {key: value for key, value in written.items() if value is not None}
    kind = settings.pop("type", "default")
    kind = settings.pop("rope_type", kind)
    kind = usual.aliases.get(kind, kind)
    if kind not in BENDS or any(isinstance(value, dict) for value in settings.values()):
        raise ConfigError(
            f"config.json: rope scaling {kind!r} of {written!r} is not implemented; "
            f"implemented are {', '.join(BENDS)}, one for all layers"
        )
    theta = float(settings.pop("rope_theta", usual.theta))
    fraction = float(settings.pop("partial_rotary_factor", usual.fraction))
    if (usual.whole and fraction != 1) or int(head_dim * fraction) < 2:
        raise ConfigError(
            f"config.json: 'partial_rotary_factor' is {fraction}, of heads of "
            f"{head_dim}; this family is implemented with "
            + ("1 only" if usual.whole else "at least one pair")
        )
    if unknown := sorted(set(settings) - ROPE_KEYS[kind]):
        raise ConfigError(
            f"config.json: rope scaling {kind!r} has the unknown settings "
            f"{', '.join(unknown)}; known are {', '.join(sorted(ROPE_KEYS[kind]))}"
        )
    inner = settings.pop("original_max_position_embeddings", context)
    first = inner if original is None else original
    pairs = int(head_dim * fraction) // 2
    fields = READERS[kind](settings, first, context, pairs)
    return Rope(theta=theta, kind=kind, fraction=fraction, **fields)


def _default(
    settings: Mapping[str, Any], original: int, context: int, pairs: int
) -> dict[str, Any]:
    del settings, original, context, pairs
    return {}


def _linear(
    settings: Mapping[str, Any], original: int, context: int, pairs: int
) -> dict[str, Any]:
    del original, context, pairs
    return {"factor": _factor(settings, "linear")}


def _dynamic(
    settings: Mapping[str, Any], original: int, context: int, pairs: int
) -> dict[str, Any]:
    # transformers bends beyond max_position_embeddings, whatever else is written
    del original, pairs
    return {"factor": _factor(settings, "dynamic"), "original_context": context}


def _llama3(
    settings: Mapping[str, Any], original: int, context: int, pairs: int
) -> dict[str, Any]:
    del context, pairs
    low, high = settings.get("low_freq_factor"), settings.get("high_freq_factor")
    if low is None or high is None or not low < high:
        raise ConfigError(
            f"config.json: rope scaling 'llama3' has low_freq_factor {low!r} and "
            f"high_freq_factor {high!r}; it needs both, the first below the second"
        )
    return {
        "factor": _factor(settings, "llama3"),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_context": original,
    }


def _yarn(
    settings: Mapping[str, Any], original: int, context: int, pairs: int
) -> dict[str, Any]:
    del pairs
    if settings.get("factor") is None:
        factor = context / original
    else:
        factor = _factor(settings, "yarn")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = settings.get("attention_factor")
    if amplitude is None:
        one, every = settings.get("mscale"), settings.get("mscale_all_dim")
        both = one and every
        amplitude = magnitude(one) / magnitude(every) if both else magnitude(1.0)
    return {
        "factor": factor,
        "original_context": original,
        "beta_fast": float(settings.get("beta_fast") or 32),
        "beta_slow": float(settings.get("beta_slow") or 1),
        "truncate": bool(settings.get("truncate", True)),
        "amplitude": float(amplitude),
    }


def _longrope(
    settings: Mapping[str, Any], original: int, context: int, pairs: int
) -> dict[str, Any]:
    lists = {}
    for name in ("short", "long"):
        values = settings.get(f"{name}_factor")
        if not isinstance(values, list) or len(values) != pairs:
            found = len(values) if isinstance(values, list) else values
            raise ConfigError(
                f"config.json: rope scaling 'longrope' has {name}_factor {found!r}; it "
                f"must list a number for each of the {pairs} pairs of a head"
            )
        lists[name] = tuple(map(float, values))
    factor = settings.get("factor")
    factor = context / original if factor is None else _factor(settings, "longrope")
    amplitude = settings.get("attention_factor")
    if amplitude is None:
        grown = math.log(factor) / math.log(original) if factor > 1 else 0.0
        amplitude = math.sqrt(1 + grown)
    return {"original_context": original, "amplitude": float(amplitude), **lists}


READERS: dict[str, Callable[..., dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _factor(settings: Mapping[str, Any], kind: str) -> float:
    factor = settings.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise ConfigError(
            f"config.json: rope scaling {kind!r} has factor {factor!r}; it must be a "
            "number of at least 1"
        )
    return float(factor)
