"""torchtune's configurations, read and translated into our own options. Torch-free; nothing named in one is imported."""

from __future__ import annotations

from trainer.torchtune.checkpoint import compare
from trainer.torchtune.overrides import apply_overrides, interpolate
from trainer.torchtune.reading import parse_yaml
from trainer.torchtune.translation import GENERATE, RECIPES, Translation, is_torchtune, translate

__all__ = [
    "GENERATE",
    "RECIPES",
    "Translation",
    "apply_overrides",
    "compare",
    "interpolate",
    "is_torchtune",
    "parse_yaml",
    "translate",
]
