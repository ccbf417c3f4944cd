"""What is known of a name that may stand behind `_component_`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.torchtune.keys import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    keys: dict[str, Key] = field(default_factory=dict)
    text: str = ""
    """What becomes of the component itself, for the table."""
