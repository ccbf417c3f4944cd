"""`python -m service.openapi` writes the description of the HTTP interface to openapi/openapi.json."""

from __future__ import annotations

import json
from pathlib import Path

from service.app import create_app
from service.settings import Settings

PATH = Path("openapi/openapi.json")


def render() -> str:
    """The document as it stands in the file. Starts nothing; the same code gives the same text."""
    return json.dumps(create_app(Settings()).openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
