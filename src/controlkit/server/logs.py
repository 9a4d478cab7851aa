"""Structured logs: one JSON object per line on standard error. Prompts and images are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in _OWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Seldom(logging.Filter):
    """Drops what was logged in the last seconds: asyncio repeats an error of `accept` thousands of times a second."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage().partition("\n")[0]
        is_new = record.created - self._last.get(text, -self._seconds) >= self._seconds
        if is_new:
            recent = {each: at for each, at in self._last.items() if record.created - at < self._seconds}
            self._last = {**recent, text: record.created}
        return is_new


def log_json_lines(level: str = "info") -> None:
    """Write the logs of the server, of uvicorn and of asyncio as JSON lines.

    Args:
        level: lowest level that is written: `info` or `warning`, for example.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name in ("controlkit.server", "uvicorn", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level.upper())
    logging.getLogger("asyncio").addFilter(_Seldom())
