"""Middleware before every endpoint: logging, access control, the size limit of bodies, and errors of the server."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from controlkit.server.problems import problem
from controlkit.server.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_OPEN = ("/healthz",)
"""Paths that answer without a token; they reveal only that the server runs."""
_PATIENCE = 30.0
"""Seconds without data after which a client that sends a body is refused."""
_CLIENT_LEFT = 499
"""Status in logs and metrics of a client that left before its response began, as in nginx."""

log = logging.getLogger("controlkit.server")


class Log:
    """ASGI middleware that logs and counts every response."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), _CLIENT_LEFT

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._service.metrics.add("controlkit_http_requests_total", method=_method(scope), status=str(status))
            facts = {"method": _method(scope), "path": scope["path"], "status": status}
            log.info("answered", extra={**facts, "seconds": round(time.monotonic() - begun, 4)})


class Guard:
    """ASGI middleware that checks every request, and answers one that fails by a fault of the server (500), or that the
    server ends when it stops (503).

    Checks, in this order: the header `Host` (a web page may point its own name at 127.0.0.1; 403), the token (401), the
    header `Origin` (browsers send some requests of foreign pages without asking; 403), and the body: its size (413)
    and that it arrives (408).
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noticed(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._answer(scope, receive, noticed)
        except asyncio.CancelledError:  # only uvicorn cancels, when it stops and a request does not end
            if not has_begun:
                await refuse(scope, send, 503, "the server is stopping; send the request again later")
        except Exception as error:
            log.error("failed", exc_info=error, extra={"path": scope["path"]})
            if has_begun:
                raise
            await refuse(scope, send, 500, "the server failed; its log has the details")

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        settings = self._service.settings
        if settings.hosts is not None and _host(headers.get("host", "")) not in settings.hosts:
            await refuse(scope, send, 403, "this server is not called so; use the address that it printed at its start")
            return
        if (
            settings.token is not None
            and scope["path"] not in _OPEN
            and not has_token(headers.get("authorization", ""), settings.token)
        ):
            ask = [(b"www-authenticate", b'Basic realm="controlkit", charset="UTF-8"')]
            await refuse(scope, send, 401, "this server needs its token: as a bearer token, or as the password", ask)
            return
        if not self._is_allowed(headers):
            text = "web pages of another origin may not use this server (--cors ORIGIN allows one)"
            await refuse(scope, send, 403, text)
            return
        most = self._service.limits.body
        try:
            replay = replaying(await _read(receive, headers, most * 10**6), receive)
        except _TooLarge:
            await refuse(scope, send, 413, f"the body is too large; this server allows {most} MB")
            return
        except TimeoutError:
            text = f"the body did not arrive: no data for {_PATIENCE:g} seconds; send the request again"
            await refuse(scope, send, 408, text, [(b"connection", b"close")])  # the rest would be read as a request
            return
        except _Gone:
            return
        await self._app(scope, replay, send)

    def _is_allowed(self, headers: dict[str, str]) -> bool:
        origin = headers.get("origin")
        if origin is None or "*" in self._service.settings.origins or origin in self._service.settings.origins:
            return True
        scheme, _, rest = origin.partition("://")
        return scheme in ("http", "https") and rest == headers.get("host")


def has_token(header: str, token: str) -> bool:
    """Whether the header `Authorization` has the token: as `Bearer TOKEN`, or as the password of any user (`Basic`)."""
    scheme, _, value = header.partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())


class _TooLarge(Exception):
    """The body exceeds the size limit."""


class _Gone(Exception):
    """The client has disconnected."""


async def _read(receive: Receive, headers: dict[str, str], most: int) -> bytes:
    """The body.

    Args:
        most: its largest size in bytes.

    Raises:
        _TooLarge: it exceeds `most`.
        _Gone: the client has disconnected.
        TimeoutError: the client sent nothing for `_PATIENCE` seconds.
    """
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise _TooLarge
    parts, size = [], 0
    while True:
        message = await asyncio.wait_for(receive(), _PATIENCE)
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _TooLarge
        if not message.get("more_body", False):
            return b"".join(parts)


def replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the whole body, then the messages after it. It keeps no body that it has returned."""
    kept: list[bytes] = [body]
    del body

    async def once() -> Message:
        if not kept:
            return await receive()
        return {"type": "http.request", "body": kept.pop(), "more_body": False}

    return once


async def refuse(
    scope: MutableMapping[str, Any],
    send: Send,
    status: int,
    text: str,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """Answer a request with an error.

    Args:
        text: a sentence for the client.
        headers: of the response, besides its own.
    """
    body = json.dumps(problem(scope["path"], status, text)).encode()
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def _host(header: str) -> str:
    """The name in a header `Host`, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _method(scope: MutableMapping[str, Any]) -> str:
    """The method as a metrics label; `OTHER` for unknown ones, so that clients cannot create labels."""
    known = ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH")
    return scope["method"] if scope["method"] in known else "OTHER"
