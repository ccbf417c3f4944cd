from __future__ import annotations

from pathlib import Path

import service
from service.openapi import PATH, render

ROOT = Path(__file__).parents[2]


def test_the_document_in_the_repository_is_current() -> None:
    assert (ROOT / PATH).read_text(encoding="utf-8") == render(), "run `make openapi`"


def test_no_route_promises_fastapis_own_errors() -> None:
    assert "HTTPValidationError" not in render()
    assert '"422"' not in render()


def test_the_version_is_the_packages() -> None:
    assert f'version = "{service.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
