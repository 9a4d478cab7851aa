"""What the tests share: a tiny Stable-Diffusion-shaped base of random weights, a control on it, a file of icons."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Before torch is imported. Threads on tensors this small only wait for each other, and beside a busy process for longer
# than the work takes; the cores are for several processes of pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

import tiny
from controlkit.data.workers import cores

# Tests share busy cores: a slow example is not a wrong one.
settings.register_profile("controlkit", deadline=None)
settings.load_profile("controlkit")


_MOST_PROCESSES = 8
"""Each takes up to 2 GB of memory, and seconds to import torch and diffusers."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """What `-n auto` means: a process for each core that this one may use."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # as xdist itself reads it
    return min(cores(), _MOST_PROCESSES)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_at_home(tmp_path_factory):
    """No test touches the cache of whoever runs the tests; each process of pytest, and each test, has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLKIT_CACHE", str(tmp_path_factory.mktemp("cache") / "session"))
        patch.delenv("CONTROLKIT_CACHE_MB", raising=False)
        yield


_caches = itertools.count()


@pytest.fixture(autouse=True)
def cache(_no_cache_at_home, tmp_path_factory, monkeypatch) -> Path:
    """The test's own cache; the folder is there once something was kept."""
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_caches))
    monkeypatch.setenv("CONTROLKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def fresh_registry():
    """The registry of systems as it is when nothing was looked up yet, and afterwards as it was."""
    from controlkit.controls import registry

    known = dict(registry.registry())
    registry._load.cache_clear()
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(known)
    registry._load.cache_clear()


@pytest.fixture(scope="session")
def tiny_base():
    return tiny.build_tiny_base()


@pytest.fixture(scope="session")
def sd1_scheduled_base(tiny_base):
    """The tiny base with Stable Diffusion 1's noise schedule and noise prediction."""
    from controlkit.bases.stable_diffusion import StableDiffusion

    return StableDiffusion(
        name="tiny-sd1",
        tokenizer=tiny_base.tokenizer,
        text_encoder=tiny_base.text_encoder,
        vae=tiny_base.vae,
        unet=tiny_base.unet,
        scheduler_config=tiny.SD1_SCHEDULE,
        defaults={"image_encoder": tiny_base.default_image_encoder},
    )


@pytest.fixture(scope="session")
def tiny_control(tiny_base):
    """A ControlNet on the tiny base that changes images. Tests leave it as it is."""
    return tiny.randomise_zero_convolutions(tiny.fresh_control(tiny_base))


@pytest.fixture(scope="session")
def union_folder(tmp_path_factory) -> Path:
    """A folder of a ControlNet Union for nano with two tasks, `union`, and of one with a task recorded, `depth`."""
    import torch

    from controlkit.bases.load import load_base
    from controlkit.controls.controlnet_union import ControlNetUnion
    from controlkit.formats.convert import convert
    from controlkit.formats.load import save_control

    folder, base = tmp_path_factory.mktemp("unions"), load_base("nano")
    torch.manual_seed(0)
    control = tiny.randomise_zero_convolutions(ControlNetUnion.for_base(base, tasks=["canny", "depth"]))
    path = save_control(folder / "union.safetensors", control, base)
    convert(path, folder / "depth.safetensors", to="controlkit", condition="depth")
    return folder


@pytest.fixture(scope="session")
def unions(union_folder):
    """The catalogue of a server with `union_folder`."""
    from controlkit.server.catalogue import list_models

    return list_models(controls=[str(union_folder)])


@pytest.fixture(scope="session")
def _saved_base(tiny_base, tmp_path_factory) -> Path:
    from controlkit.nano.base_objective import save_base

    folder = tmp_path_factory.mktemp("tiny") / "base"
    save_base(tiny_base, folder)
    return folder


@pytest.fixture
def base_folder(_saved_base, tmp_path) -> Path:
    """The tiny base as a diffusers folder of the test's own."""
    return shutil.copytree(_saved_base, tmp_path / "base")


@pytest.fixture(scope="session")
def condition_image() -> np.ndarray:
    """A white ring and a bar on black, 64 x 64."""
    image = np.zeros((64, 64, 3), np.uint8)
    y, x = np.mgrid[:64, :64]
    image[np.abs(np.hypot(x - 30, y - 26) - 16) < 1.2] = 255
    image[50:52, 8:56] = 255
    return image


@pytest.fixture(scope="session")
def icons_file(tmp_path_factory) -> Path:
    """An `icons.npz` in the format of `IconSets`: per style three icons to train on and two held out."""
    from controlkit.nano.icons import STYLES

    path = tmp_path_factory.mktemp("icons") / "icons.npz"
    names = tiny.concepts(False, 3) + tiny.concepts(True, 2)
    shapes = ("disc", "square", "triangle", "disc", "square")
    arrays = {}
    for number, style in enumerate(STYLES):
        colours = [(40 * number, 200 - 30 * i, 60 * i) for i in range(len(names))]
        arrays[style] = np.stack([tiny.hand_made_icon(s, c) for s, c in zip(shapes, colours, strict=True)])
    index = {"names": dict.fromkeys(STYLES, names), "groups": dict.fromkeys(names, "Objects")}
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(path, **arrays)
    return path
