"""Refuse addresses in what the page's client sends: Gradio would fetch them in place of an uploaded file."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_REFUSED = b'{"detail": "send the bytes of a file, not its address"}'


class NoAddresses:
    """ASGI middleware for paths below `path`. It stands behind `server.guards.Guard`, which bounds bodies."""

    def __init__(self, app: App, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(f"{self._path}/"):
            await self._app(scope, receive, send)
            return
        if "=http" in scope["path"].lower():  # /file=http://..., /proxy=http://...
            await _refuse(send)
            return
        kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
        if scope["method"] != "POST" or not any(b"json" in kind for kind in kinds):
            await self._app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        try:
            has = _has_address(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            has = True
        if has:
            await _refuse(send)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


def _has_address(value: Any) -> bool:
    """Whether a file is named by an address: any `path` that does not begin with a slash or a drive."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        return any(_has_address(each) for each in value.values())
    return isinstance(value, list) and any(_has_address(each) for each in value)


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSED)).encode())]
    await send({"type": "http.response.start", "status": 422, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSED})
