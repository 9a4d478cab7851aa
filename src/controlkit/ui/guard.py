"""Refuse addresses in what the page's client sends: Gradio would fetch them in place of an uploaded file."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

from controlkit.server.guards import App, Receive, Send, refuse, replaying

_REFUSED = "send the bytes of a file, not its address"


class NoAddresses:
    """ASGI middleware for paths below `path`. It stands behind `server.guards.Guard`, which bounds bodies."""

    def __init__(self, app: App, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(f"{self._path}/"):
            await self._app(scope, receive, send)
            return
        if "=http" in scope["path"].lower():  # /file=http://..., /proxy=http://...
            await refuse(scope, send, 422, _REFUSED)
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
            await refuse(scope, send, 422, _REFUSED)
            return
        await self._app(scope, replaying(body, receive), send)


def _has_address(value: Any) -> bool:
    """Whether a file is named by an address: any `path` that does not begin with a slash or a drive."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        return any(_has_address(each) for each in value.values())
    return isinstance(value, list) and any(_has_address(each) for each in value)
