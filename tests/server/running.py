"""A server that runs: in a thread of the tests, or as the command."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

START = 180
"""Seconds that a server may take to start on a busy machine."""


def drawing(size: int = 64) -> Image.Image:
    """The sailboat of the demo."""
    path = str(files("controlkit") / "assets" / "demo" / "sailboat.png")
    return Image.open(path).convert("RGB").resize((size, size))


def base64_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def image_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


class Running:
    """A server and a client of it."""

    def __init__(self, url: str, service: Any = None, **options: Any) -> None:
        self.url, self.service = url, service
        self.client = httpx.Client(base_url=url, timeout=300, trust_env=False, **options)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, **options).raise_for_status().json()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def submit(self, **body: Any) -> str:
        """Queue a request of controlkit's own API; returns its id."""
        answer = self.post("/controlkit/v1/jobs", body)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def status(self, name: str) -> dict[str, Any]:
        return self.get(f"/controlkit/v1/jobs/{name}")

    def wait(self, name: str, *states: str, seconds: float = 240) -> dict[str, Any]:
        """The status of a request, once it is one of `states`; default: once it has ended."""
        end = time.monotonic() + seconds
        while (status := self.status(name))["state"] not in (states or ("done", "failed", "cancelled")):
            assert time.monotonic() < end, status
            time.sleep(0.02)
        return status


@contextlib.contextmanager
def in_thread(folder: Path, **settings: Any) -> Iterator[Running]:
    """A server on a free port of this machine, with nano; `settings` are those of `Settings`."""
    import uvicorn

    from controlkit.apps.serve import _listening
    from controlkit.server.app import create_app
    from controlkit.server.catalogue import list_models
    from controlkit.server.service import Settings
    from controlkit.server.spec import Execution

    settings = {"queue": folder / "queue.sqlite", "execution": Execution(device="cpu"), **settings}
    settings.setdefault("catalogue", list_models())
    app = create_app(Settings(**settings))
    with _listening("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.02)
            token = settings.get("token")
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            running = Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app.state.service, headers=headers)
            with running.client:
                yield running
        finally:
            server.should_exit = True
            thread.join(60)


class Command:
    """`controlkit serve` as a process."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        command = [sys.executable, "-m", "controlkit", "serve", "--port", "0", "--device", "cpu"]
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [*command, "--queue", str(folder / "queue.sqlite"), *words],
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        assert url.startswith("http://"), self.log.read_text()
        self.running = Running(url)
        end = time.monotonic() + START
        while True:
            with contextlib.suppress(httpx.TransportError):
                self.running.get("/healthz")
                break
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        self.running.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
