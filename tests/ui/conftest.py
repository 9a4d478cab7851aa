"""The page as the command serves it, and a browser on it; without either, these tests are skipped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import PATIENCE, Browser, missing

REASON = missing()


def pytest_collection_modifyitems(items):
    for item in items:
        if REASON is not None and Path(__file__).parent in item.path.parents and "page" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason=REASON))


class Served:
    """`controlkit ui` as a process."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.work = folder / "work"
        command = [sys.executable, "-m", "controlkit", "ui", "--port", "0", "--device", "cpu", "--work", str(self.work)]
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [*command, "--queue", str(folder / "queue.sqlite"), *words],
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            text=True,
            env={**os.environ, "CONTROLKIT_CACHE": str(folder / "cache")},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.log.read_text()
        self.root = self.url.removesuffix("/ui")
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.root}/healthz", trust_env=False).raise_for_status()
                return
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    pytest.importorskip("gradio")
    process = Served(tmp_path_factory.mktemp("ui"))
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    window = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield window
    finally:
        window.close()


@pytest.fixture
def page(served, chromium) -> Browser:
    """The page, opened anew."""
    chromium.resize(1360, 1000)
    chromium.requested()
    chromium.open(f"{served.url}/")
    return chromium
