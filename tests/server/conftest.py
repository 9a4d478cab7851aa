"""One server for the tests that only ask it."""

from __future__ import annotations

import pytest
from running import Running, in_thread

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Running:
    with in_thread(tmp_path_factory.mktemp("server")) as running:
        yield running
