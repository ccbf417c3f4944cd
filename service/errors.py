"""Every error of the HTTP service as one object: `{"error": {"message", "type", "param", "code"}}`.

ApiError            an answer with its own status
UserError           400: a mistake that the message names, with its mend
NotFoundError       404
RequestValidationError (what FastAPI would answer with 422)    400
a disk that is full or read-only, a database that is locked, a helping process that was killed    503
anything else       500 without details; the log has them
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from reprlib import Repr
from typing import Any, get_args

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Tag
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lm.errors import NotFoundError, UserError
from trainer.strict import known_fields

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error"}
ROUTING_MESSAGES = {
    404: "there is no {method:.20} {path:.200}: see /docs for the routes that exist",
    405: "{path:.200} does not take {method:.20}: see /docs for the methods that it takes",
}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than success. `type` follows from the status unless it is given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.type = type or TYPES.get(status, "invalid_request_error")
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The error object as JSON."""
        param = None if self.param is None else _printable(self.param)
        detail = {"message": _printable(self.detail), "type": self.type, "param": param, "code": self.code}
        return msgspec.json.encode({"error": detail})


def unavailable(message: str, *, retry_after: int = 1) -> ApiError:
    """503: loading, draining, or no engine. Worth another try."""
    return ApiError(503, message, retry_after=retry_after)


def conflict(message: str, *, param: str | None = None) -> ApiError:
    """409: the state of the thing does not allow this. The SDK is told not to repeat the request."""
    error = ApiError(409, message, param=param)
    error.headers = {"x-should-retry": "false"}
    return error


def as_api_error(error: Exception) -> ApiError:
    """What the client is told about `error`. One that is not meant for clients is logged, and told as a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotFoundError):
        return ApiError(404, str(error), param=error.param, code="model_not_found" if error.param == "model" else None)
    if isinstance(error, UserError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, ChildProcessError):
        logger.error("%s", error)
        return unavailable(f"{error}: try again", retry_after=5)
    if (reason := _storage_problem(error)) is not None:
        logger.error("nothing can be stored: %s", reason)
        return unavailable(
            f"the service cannot store anything now: {reason}; its operator must mend that", retry_after=60
        )
    logger.error("unexpected error in a request", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log has the reason")


def install_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return error_response(request, as_api_error(error))

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        cause = error.__cause__
        if isinstance(cause, OSError) and _storage_problem(cause) is not None:  # met while the body was received
            return error_response(request, as_api_error(cause))
        return error_response(request, error if isinstance(error, ApiError) else _plain_http_error(request, error))

    async def answer_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request, _validation_error(request, error))

    app.add_exception_handler(UserError, answer)
    app.add_exception_handler(OSError, answer)
    app.add_exception_handler(sqlite3.OperationalError, answer)
    app.add_exception_handler(Exception, answer)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_http)


def _storage_problem(error: Exception) -> str | None:
    """Why nothing can be written now, where that is what `error` says."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error)
    return error.strerror if isinstance(error, OSError) and error.errno in DISK_ERRORS else None


def error_response(request: Request, error: ApiError) -> Response:
    headers = dict(error.headers or {})
    if request_id := request.scope.get("state", {}).get("request_id"):
        headers["X-Request-Id"] = request_id  # a 500 is made outside of the middleware that adds it elsewhere
    return Response(error.body(), error.status_code, headers, media_type="application/json")


def _plain_http_error(request: Request, error: HTTPException) -> ApiError:
    template = ROUTING_MESSAGES.get(error.status_code, "{detail}")
    detail = error.detail if error.__cause__ is None else f"the body cannot be read: {_why(error.__cause__)}"
    message = template.format(method=request.method, path=request.url.path, detail=detail)
    converted = ApiError(error.status_code, message)
    converted.headers = error.headers
    return converted


def _why(error: BaseException) -> str:
    """In whose own words the decoder's limits would be told."""
    if isinstance(error, RecursionError):
        return "it has too many objects and lists within each other"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    return "a number has too many digits" if "digits" in str(error) else str(error)


_echo = Repr()
_echo.maxstring = _echo.maxother = 100
_echo.maxlevel = 3


def _validation_error(request: Request, error: RequestValidationError) -> ApiError:
    """The first mistake: field, value, and what is allowed."""
    first: dict[str, Any] = error.errors()[0]
    source, *path = first["loc"]
    model, path = _body_model(request, path)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {path[0]}")
    path = [part for part in path if not str(part).startswith("(")]  # tags of the schemas, not fields
    field = ".".join(str(part) for part in path)
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        what = f"the {source} must be a JSON object, sent with Content-Type: application/json"
        return ApiError(400, message if first["type"] == "value_error" else what)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: unknown field; {_known_fields(model, path)}", param=field)
    if first["type"] == "missing":
        return ApiError(400, f"{field}: this field is required", param=field)
    return ApiError(400, f"{field}: {message[:1].lower()}{message[1:]} (got {_echo.repr(first['input'])})", param=field)


def _body_model(request: Request, path: list[str | int]) -> tuple[type[BaseModel] | None, list[str | int]]:
    """The model of the body, and the path within it. Where a body has one of several forms, the path begins with the
    tag of the one that was meant."""
    body_field = getattr(request.scope.get("route"), "body_field", None)
    body = None if body_field is None else body_field.field_info.annotation
    for form, *marks in map(get_args, get_args(body)):
        if path and any(isinstance(mark, Tag) and mark.tag == path[0] for mark in marks):
            body, path = form, path[1:]
            break
    return (body if isinstance(body, type) and issubclass(body, BaseModel) else None), path


def _known_fields(model: type[BaseModel] | None, path: list[str | int]) -> str:
    return "remove it" if model is None else known_fields(model, tuple(path))


def _printable(text: str) -> str:
    """Without lone surrogates, which have no UTF-8 form."""
    return text.encode("utf-8", "backslashreplace").decode()
