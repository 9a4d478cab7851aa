"""The page as the command serves it, and a browser on it; without either, these tests are skipped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from browser import PATIENCE, Browser, missing
from safetensors import safe_open
from safetensors.torch import save_file

from controlkit.bases.folders import nano_folder

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
def models(tmp_path_factory) -> Path:
    """A folder with a LoRA of nano in peft's format that changes images much, nano's own autoencoder under another
    name, and an embedding."""
    folder = tmp_path_factory.mktemp("models")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    (weights,) = (nano_folder() / "unet").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        rows, columns = file.get_slice(f"{name}.weight").get_shape()
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, columns, generator=generator),
        f"base_model.model.{name}.lora_B.weight": torch.randn(rows, 2, generator=generator),
    }
    (folder / "loras" / "wild").mkdir(parents=True)
    save_file(lora, folder / "loras" / "wild" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "loras" / "wild" / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copytree(nano_folder() / "vae", folder / "vaes" / "own")
    (weights,) = (nano_folder() / "text_encoder").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        (words,) = [key for key in file.keys() if key.endswith("token_embedding.weight")]  # noqa: SIM118
        width = file.get_slice(words).get_shape()[1]
    (folder / "embeddings").mkdir()
    save_file({"emb_params": torch.zeros(1, width)}, folder / "embeddings" / "wavy.safetensors")
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory, models, union_folder) -> Iterator[Served]:
    pytest.importorskip("gradio")
    words = [word for kind in ("loras", "vaes", "embeddings") for word in (f"--{kind}", str(models / kind))]
    words += ["--controls", str(union_folder)]
    process = Served(tmp_path_factory.mktemp("ui"), *words)
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
