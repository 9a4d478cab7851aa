"""Errors as responses: one shape for every status, and OpenAI's below `/v1`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

STATUSES = {
    400: "bad-request",
    401: "wrong-token",
    403: "not-allowed",
    404: "not-found",
    405: "wrong-method",
    408: "timeout",
    409: "not-finished",
    413: "too-large",
    422: "invalid",
    500: "server-failed",
    503: "unavailable",
}
"""Status -> code of an error that has none of its own (docs/errors.md)."""
_OPENAI = "/v1/"


class Field(BaseModel):
    """A field of a request that is invalid."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    loc: list[str]
    """Its place: `body`, then keys and indices."""
    msg: str
    type: str


class Problem(BaseModel):
    """An error."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    detail: str | list[Field]
    """The message, or the invalid fields one by one."""
    message: str
    """A sentence: what was sent, what is expected, what to do."""
    code: str
    """Stable name of the kind of error (docs/errors.md and docs/server.md)."""


class OpenAIError(BaseModel):
    """What is wrong, as OpenAI's API has it."""

    message: str
    type: str
    code: str
    param: str | None = None


class OpenAIProblem(BaseModel):
    """An error of OpenAI's API."""

    error: OpenAIError


def problem(path: str, status: int, message: str, code: str | None = None, fields: Any = None) -> dict[str, Any]:
    """The body of an error.

    Args:
        path: that of the request, which decides the shape: `OpenAIProblem` below `/v1`, else `Problem`.
        code: default: that of the status.
        fields: the invalid fields (`Field`), if there are any.
    """
    code = code or STATUSES.get(status, "error")
    if path.startswith(_OPENAI):
        kind = "invalid_request_error" if status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "code": code, "param": None}}
    return {"detail": fields or message, "message": message, "code": code}


def responses(*statuses: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The errors of an endpoint, for its schema.

    Args:
        statuses: its own, besides those that every endpoint has.
    """
    model = OpenAIProblem if openai else Problem
    return {status: {"model": model} for status in sorted({400, 401, 403, 408, 413, 422, 500, *statuses})}
