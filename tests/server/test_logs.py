"""The server's log: JSON lines."""

from __future__ import annotations

import json
import logging

import pytest

from controlkit.server.logs import log_json_lines


@pytest.fixture
def loggers():
    """Their handlers and filters are as before after the test."""
    found = [logging.getLogger(name) for name in ("controlkit.server", "uvicorn", "uvicorn.error", "asyncio")]
    before = [(each, each.handlers, each.filters, each.propagate, each.level) for each in found]
    yield
    for each, handlers, filters, propagate, level in before:
        each.handlers, each.filters, each.propagate = handlers, filters, propagate
        each.setLevel(level)


def test_lines_of_asyncio_are_json_and_not_repeated(loggers, capsys):
    logging.getLogger("asyncio").filters = []
    log_json_lines()
    for text in ("cannot accept\nsocket 1", "cannot accept\nsocket 2", "another error"):
        logging.getLogger("asyncio").error(text)
    logging.getLogger("controlkit.server").error("failed", extra={"job": "a"})
    logging.getLogger("controlkit.server").error("failed", extra={"job": "b"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"].partition("\n")[0] for line in lines] == [
        *("cannot accept", "another error", "failed", "failed"),
    ]
