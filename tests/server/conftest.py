"""One server for the tests that only ask it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from running import Running, in_thread
from safetensors import safe_open
from safetensors.torch import save_file

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from controlkit.bases.folders import nano_folder
from controlkit.formats.load import shipped_controls
from controlkit.server.catalogue import list_models
from controlkit.server.limits import Limits


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a LoRA of nano that changes images much, nano's autoencoder, a control, and a file that is none."""
    folder = tmp_path_factory.mktemp("models")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    (weights,) = (nano_folder() / "unet").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        rows, columns = file.get_slice(f"{name}.weight").get_shape()
    stem = f"lora_unet_{name}".replace(".", "_")
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{stem}.lora_down.weight": torch.randn(2, columns, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(rows, 2, generator=generator),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    (folder / "loras" / "styles").mkdir(parents=True)
    save_file(lora, folder / "loras" / "styles" / "wild.safetensors")
    shutil.copytree(nano_folder() / "vae", folder / "vaes" / "own")
    (folder / "controls").mkdir()
    shutil.copy(shipped_controls()["canny"], folder / "controls" / "Edges_v2.safetensors")
    (folder / "controls" / "broken.safetensors").write_bytes(b"no weights")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory, models) -> Running:
    catalogue = list_models(
        controls=[str(models / "controls")], loras=[str(models / "loras")], vaes=[str(models / "vaes")]
    )
    limits = Limits(body=2, pixels=256 * 256, input_pixels=1024 * 1024, steps=150, images=8, controls=3)
    with in_thread(tmp_path_factory.mktemp("server"), catalogue=catalogue, limits=limits) as running:
        yield running
