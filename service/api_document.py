"""The OpenAPI document: as FastAPI makes it, with our error object where that speaks of its own 422."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.errors import ErrorBody

ERROR = {
    "description": "What went wrong",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
}

KEYS = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "Key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Deterministic: the same code gives the same document."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["responses"]["4XX"] = ERROR
                operation["responses"]["5XX"] = ERROR
        document["security"] = [{}, *({name: []} for name in KEYS)]  # none, where no keys are configured
        document.setdefault("components", {})["securitySchemes"] = KEYS
        schemas = document["components"].setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**error.pop("$defs"), "ErrorBody": error}
        app.openapi_schema = document
    return app.openapi_schema
