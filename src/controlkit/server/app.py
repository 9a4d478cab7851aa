"""The FastAPI application: all APIs on one service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from controlkit._version import __version__
from controlkit.errors import UserError
from controlkit.server import a1111, a1111_lists, controlnet, native, openai
from controlkit.server.guards import Guard, Log
from controlkit.server.metrics import Key
from controlkit.server.problems import problem, responses
from controlkit.server.replies import IGNORED, in_words_of_clients
from controlkit.server.service import QueueStopped, Service, Settings
from controlkit.server.store import QueueFull

_RETRY_AFTER = "10"
"""Seconds that a client should wait if the queue is full."""


def create_app(settings: Settings, page: Callable[[FastAPI, Service], object] | None = None) -> FastAPI:
    """The application. Its worker starts and ends with it.

    Args:
        page: mounts a web page, behind the same guards as the APIs.

    Raises:
        UserError: the file of the queue cannot be used.
    """
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="controlkit",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(QueueFull, _full)
    app.add_exception_handler(QueueStopped, _stopped)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    for router in (native.router, a1111.router, a1111_lists.router, controlnet.router, openai.router):
        app.include_router(router)

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Response:
        """Whether the server runs, and its queue with it."""
        is_alive = service.supervisor.is_alive()
        return JSONResponse({"status": "ok" if is_alive else "the queue has stopped"}, 200 if is_alive else 503)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse, responses=responses())
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        gauges: dict[Key, float] = {("controlkit_info", (("version", __version__),)): 1}
        for state, count in (await service.counts()).items():
            gauges["controlkit_jobs", (("state", state),)] = count
        text = service.metrics.text(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    if page is not None:
        page(app, service)
    app.add_middleware(Guard, service=service)
    if settings.origins:
        # Around the guard, so that pages can read why it refuses a request.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[IGNORED],
        )
    app.add_middleware(Log, service=service)
    return app


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    text = in_words_of_clients(str(error), request.app.state.service.catalogue, request.url.path)
    return _answer(request, 422, text, error.code)


async def _invalid(request: Request, error: Exception) -> Response:
    """Which fields are invalid, and why; without their values, which may be images or invalid text."""
    assert isinstance(error, RequestValidationError)
    fields: list[dict[str, Any]] = [
        {"loc": [_printable(str(part)) for part in each["loc"]], "msg": _printable(each["msg"]), "type": each["type"]}
        for each in error.errors()[:20]
    ]
    text = "; ".join(f"{'.'.join(each['loc'][1:])}: {each['msg']}".removeprefix(": ") for each in fields[:3])
    return _answer(request, 422, text, "wrong-type", fields)


async def _full(request: Request, error: Exception) -> Response:
    response = _answer(request, 503, "the queue is full; try again later", "queue-full")
    response.headers["Retry-After"] = _RETRY_AFTER
    return response


async def _stopped(request: Request, error: Exception) -> Response:
    return _answer(request, 503, "the queue has stopped; the server must be started again", "queue-stopped")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    response = _answer(request, error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _answer(request: Request, status: int, text: str, code: str | None = None, fields: Any = None) -> Response:
    return JSONResponse(problem(request.url.path, status, _printable(text), code, fields), status)


def _printable(text: str) -> str:
    """Text that UTF-8 can represent, cut to 2,000 characters."""
    return text[:2000].encode("utf-8", "replace").decode("utf-8")
