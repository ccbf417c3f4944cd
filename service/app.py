"""The HTTP application: routes, middleware and error handlers around the services."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request
from starlette.responses import Response

from service import __version__
from service.api_document import openapi_document
from service.auth import Authentication
from service.errors import install_error_handlers
from service.middleware import BodyLimit, RequestId
from service.routes import (
    chat,
    checkpoint_files,
    checkpoints,
    completions,
    files,
    fine_tuning,
    finetune,
    finetune_figures,
    generate,
    health,
    models,
    responses,
    tokenize,
)
from service.services import Services, running_services
from service.settings import Settings
from service.sse import ClientGone

ROUTERS = (
    generate.router,
    finetune.router,
    finetune_figures.router,
    checkpoints.router,
    checkpoint_files.router,
    completions.router,
    chat.router,
    responses.router,
    models.router,
    tokenize.router,
    files.router,
    fine_tuning.router,
    health.router,
)
CLIENT_CLOSED_REQUEST = 499

Compose = Callable[[Settings], AbstractAsyncContextManager[Services]]


def create_app(settings: Settings, *, compose: Compose = running_services) -> FastAPI:
    """The application. Its services start and stop with its lifespan; nothing happens before."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with compose(settings) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="TuneServe",
        version=__version__,
        description="Fine-tune a language model over HTTP, and answer from the result.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_middleware(BodyLimit, limit=settings.max_body_size, larger={"/v1/files": settings.max_upload_size})
    if settings.api_keys:
        app.add_middleware(Authentication, keys=settings.api_keys)
    app.add_middleware(RequestId)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
    return app


async def _client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the status is what nginx logs for this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
