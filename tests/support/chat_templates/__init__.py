"""The chat templates of well-known models, as files beside this one."""

from __future__ import annotations

import json
from pathlib import Path

from lm.template import TOOL_TEMPLATE_FILE, ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.tiny_tokenizers import write_json, write_tokenizer

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
STYLES = {"llama3.1": "llama3", "llama3.2": "llama3", "mistral": "zephyr"}


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def write_chat_model(folder: Path, name: str) -> ChatTemplate:
    """A tiny tokenizer and the template `name` as a model folder has them. Hermes 2 has one for tools beside another."""
    style = STYLES.get(name, STYLES.get(name.split("_")[0], "smollm2"))
    write_tokenizer(folder, style)
    if name == "hermes2_tool_use":
        (folder / TOOL_TEMPLATE_FILE).parent.mkdir()
        (folder / TOOL_TEMPLATE_FILE).write_text(source_of(name), encoding="utf-8")
    else:
        (folder / "chat_template.jinja").write_text(source_of(name), encoding="utf-8")
    return load_template(folder, load_tokenizer(folder))


def add_special_tokens(path: Path, markers: tuple[str, ...]) -> None:
    """To a tokenizer.json, behind its other tokens."""
    data = json.loads(path.read_text())
    size = max([*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])]) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    data["added_tokens"] += [{"id": size + index, "content": text} | flags for index, text in enumerate(markers)]
    write_json(path, data)
