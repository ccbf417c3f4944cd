"""How far a run is. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from trainer.validation import History


@dataclass(slots=True, kw_only=True)
class Position:
    """What of a run's state are plain values and change with its steps."""

    step: int = 0
    """The last one that was taken."""
    finished: bool = True
    """Whether what follows that step was done, too: its validation, its samples, its checkpoint."""
    trained_tokens: int = 0
    """Since the start of the run."""
    means: dict[str, float] = field(default_factory=dict)
    """Loss and figures of that step."""
    history: History = field(default_factory=History)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "history": History(**values["history"])})
