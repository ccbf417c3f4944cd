"""What POST /models takes."""

from __future__ import annotations

from pydantic import Field

from service.schemas.requests import Strict


class ModelRequest(Strict):
    path: str = Field(min_length=1, max_length=4096)
    """Folder of the model, relative to models/ in the home of the service."""
    name: str | None = Field(default=None, min_length=1, max_length=96)
    """Name of the model in requests. Default: the folder's own name."""
