"""The application: routes, their OpenAPI description, and errors in one shape."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as RouteError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from assay import __version__
from assay.engine.server.config import ServerConfig
from assay.engine.server.errors import ApiError, unaccepted
from assay.engine.server.guard import Gate, Guard
from assay.engine.server.logs import Log
from assay.engine.server.metrics import MEDIA, EngineReport, Metrics
from assay.engine.server.page import page
from assay.engine.server.service import Service
from assay.engine.server.worker import Worker

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in (
        (400, "A field that is unknown, or a value that is not accepted"),
        (401, "No key, or one that this server does not know"),
        (403, "Another host's name, or another site's page"),
        (404, "Another model"),
        (408, "A body that does not arrive"),
        (413, "A body that is too long"),
        (415, "A body that is not JSON"),
        (429, "Too many replies are under way"),
        (500, "The engine failed"),
        (503, "Not ready yet, or not any more"),
    )
}


def create_app(config: ServerConfig, worker: Worker, metrics: Metrics, gate: Gate, log: Log) -> FastAPI:
    """The server's application; `gate` opens once the worker is ready."""
    app = FastAPI(title="assay", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    service = Service(config, worker)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat)
    app.get("/v1/models")(service.models)
    app.post("/tokenize")(service.tokenize)
    app.post("/detokenize")(service.detokenize)

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        if gate.reason is not None or worker.status != "ready":
            raise ApiError(503, gate.reason or "the engine has failed", retry=5)
        return Response(status_code=200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        return Response(metrics.page(), media_type=MEDIA)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page()

    metrics.registry.register(EngineReport(lambda: worker.stats))
    app.add_exception_handler(ApiError, _answered)
    app.add_exception_handler(RequestValidationError, _misread)
    app.add_exception_handler(RouteError, _lost)
    refused, coming = partial(metrics.ended, "refused"), worker.coming
    app.add_middleware(Guard, config=config, gate=gate, log=log, refused=refused, coming=coming)
    return app


async def _answered(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _misread(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return unaccepted(error.errors()).response()


async def _lost(request: Request, error: Exception) -> Response:
    """No such route, another method, or a body that json cannot read."""
    assert isinstance(error, HTTPException | RouteError)
    where = f"{request.method} {request.url.path}: " if error.status_code in (404, 405) else ""
    answer = ApiError(error.status_code, f"{where}{error.detail}").response()
    answer.headers.update(error.headers or {})
    return answer
