"""Every key of torchtune's recipes with what becomes of it, as Markdown. `docs/torchtune.md` is this."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from trainer.torchtune.component import Component
from trainer.torchtune.components import COMPONENTS, REFUSED
from trainer.torchtune.keys import COMMON, GENERATION, PLACES, PROMPT, TRAINING, Key

HEAD = """\
# torchtune's configurations

Printed by `python -m trainer.torchtune`; a test keeps this file so.

`tuneserve run`, `tuneserve generate`, `tuneserve validate` and the field `config` of `POST /finetune` read torchtune's
YAML. A name behind `_component_` is looked up in the lists below and never imported. A name or key that stands in no list
is an error that says what is allowed. `${a.b}` means a value of the same file. YAML aliases are not read.

**honoured**: it does what it does in torchtune, as far as the text says. **mapped**: the run goes on, and a note says what
happens instead. **refused**: an error with the reason, unless the value is one of those in brackets.
"""


def markdown() -> str:
    """The whole document."""
    sections = [
        _section("At the top", COMMON),
        _section("At the top, for training", TRAINING),
        _section("At the top, for generate", GENERATION),
        _section("prompt", PROMPT),
        *(section for place in PLACES for section in _place(place)),
        _refused(),
        f"{counts()}\n",
    ]
    return "\n".join([HEAD, *sections])


def counts() -> str:
    """How many there are of what."""
    keys = [key for _, group in all_keys() for key in group]
    parts = [f"{sum(key.is_a(does) for key in keys)} {does}" for does in ("honoured", "mapped", "refused")]
    components = sum(map(len, COMPONENTS.values()))
    return f"{len(keys)} keys ({', '.join(parts)}), {components} components, {len(REFUSED)} more refused by name."


def all_keys() -> Iterator[tuple[str, tuple[Key, ...]]]:
    """Each table once: where it applies, and its keys. Components with the same keys share a table."""
    yield "", (*COMMON, *TRAINING, *GENERATION)
    yield "prompt", PROMPT
    for place in PLACES:
        for _, keys in _tables(place):
            yield place, keys


def _tables(place: str) -> list[tuple[list[tuple[str, Component]], tuple[Key, ...]]]:
    """Components of a place, together where they have the same keys."""
    grouped: list[tuple[list[tuple[str, Component]], tuple[Key, ...]]] = []
    for name, component in COMPONENTS[place].items():
        keys = tuple(component.keys.values())
        components = next((components for components, known in grouped if known == keys), None)
        if components is None:
            grouped.append(([(name, component)], keys))
        else:
            components.append((name, component))
    return grouped


def _place(place: str) -> Iterator[str]:
    yield f"## `{place}`: {PLACES[place]}\n"
    for components, keys in _tables(place):
        for text, group in itertools.groupby(components, key=lambda item: item[1].text):
            yield f"- {', '.join(f'`{name}`' for name, _ in group)}: {text}"
        yield _rows(keys) if keys else "\nNo keys.\n"


def _section(title: str, keys: Iterable[Key]) -> str:
    return f"## {title}\n{_rows(keys)}"


def _rows(keys: Iterable[Key]) -> str:
    rows = [f"| `{key.name}` | {key.does} | {_text(key)} |" for key in keys]
    return "\n".join(["", "| key | what | how |", "|---|---|---|", *rows, ""])


def _text(key: Key) -> str:
    text = key.text.replace("|", "\\|")
    if not key.is_a("refused"):
        return text
    return f"{text} ({', '.join(f'`{_yaml(value)}`' for value in key.silent)})"


def _yaml(value: object) -> str:
    words = {None: "null", True: "True", False: "False"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _refused() -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(["## Components that are refused by name", "", "| name | reason |", "|---|---|", *rows, ""])
