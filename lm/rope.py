"""How a config stretches its rotary frequencies past the context a model was pre-trained on. Torch-free.

The formulas are applied in `lm.model`. Both spellings are read: transformers v4 (`rope_theta`, `rope_scaling`) and v5
(`rope_parameters`); `rope_scaling` goes first where a config has both, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lm.config_fields import Fields
from lm.errors import UserError

DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """Every frequency divided by `factor` (Chen et al., 2023)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaRope:
    """Llama 3.1's: slow frequencies divided by `factor`, fast ones kept, a linear passage between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """YaRN (Peng et al., 2023): as Llama 3.1's with the passage laid over the dimensions, and hotter attention."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    """Turns within the original context from which on a frequency is kept."""
    beta_slow: float
    """Turns up to which a frequency is divided."""
    attention_factor: float
    """What cosine and sine are multiplied by."""
    truncate: bool
    """Let the passage begin and end at whole dimensions."""


RopeScaling = LinearRope | LlamaRope | YarnRope


def read_rope(config: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a `config.json`. Raises UserError naming the key, its value and what is supported."""
    fields = Fields(config)
    theta = fields.number("rope_theta", DEFAULT_THETA)
    _refuse_partial(fields)
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    data = config.get(name)
    if data is None:
        return theta, None
    if not isinstance(data, Mapping):
        raise fields.wrong(name, "an object")
    rope = Fields(data, f"{name}.")
    _refuse_partial(rope)
    if nested := [key for key, value in data.items() if isinstance(value, Mapping)]:
        raise rope.wrong(nested[0], "absent: one set of rotary parameters must serve all layers")
    theta = rope.number("rope_theta", theta)
    kind = rope.one_of("rope_type" if "rope_type" in data else "type", SUPPORTED_ROPE_TYPES, "default")
    original = rope.size("original_max_position_embeddings", max_position_embeddings)
    original = fields.size("original_max_position_embeddings", original)  # beside the object, it goes first
    return theta, READERS[kind](rope, theta, max_position_embeddings, original)


def _refuse_partial(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.wrong("partial_rotary_factor", "1: heads are rotated as a whole")


def _default(rope: Fields, theta: float, longest: int, original: int) -> None:
    return None


def _linear(rope: Fields, theta: float, longest: int, original: int) -> LinearRope:
    return LinearRope(factor=rope.number("factor"))


def _llama3(rope: Fields, theta: float, longest: int, original: int) -> LlamaRope:
    scaling = LlamaRope(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=original,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.wrong("high_freq_factor", f"more than low_freq_factor = {scaling.low_freq_factor}")
    return scaling


def _yarn(rope: Fields, theta: float, longest: int, original: int) -> YarnRope:
    if theta <= 1:
        raise UserError(f"rope_theta: must be more than 1 for yarn (got {theta})", param="rope_theta")
    factor = rope.number("factor", longest / original)
    scaling = YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number_or_none("beta_fast") or 32.0,
        beta_slow=rope.number_or_none("beta_slow") or 1.0,
        attention_factor=rope.number_or_none("attention_factor") or _attention_factor(rope, factor),
        truncate=rope.flag("truncate", True),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise rope.wrong("beta_fast", f"at least beta_slow = {scaling.beta_slow}")
    return scaling


def _attention_factor(rope: Fields, factor: float) -> float:
    """What the paper recommends, or the ratio that DeepSeek's two `mscale` keys say."""
    above, below = rope.number_or_none("mscale"), rope.number_or_none("mscale_all_dim")
    growth = 0.1 * math.log(max(factor, 1.0))
    return (growth * above + 1) / (growth * below + 1) if above and below else growth + 1


READERS: dict[str, Callable[[Fields, float, int, int], RopeScaling | None]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
SUPPORTED_ROPE_TYPES = tuple(READERS)
