"""A learned condition through every verb: an adapter is trained on the poses that MediaPipe finds in photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlkit.apps.cli import main
from controlkit.conditions import models
from controlkit.data.pairs import read_pairs, split_pairs

PHOTOGRAPHS = Path(__file__).with_name("photographs")
PROMPT = "a photo of a person"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a verb in a folder of its own and return its JSON."""
    pytest.importorskip("mediapipe", reason="needs controlkit[mediapipe]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def verb(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    yield verb
    models.unload_models()


@pytest.mark.slow  # MediaPipe is imported by three processes, and 100 steps are trained
def test_an_adapter_learns_which_photograph_has_which_pose(run) -> None:
    shutil.copytree(PHOTOGRAPHS, "people")
    run("pairs", "people", "--conditions", "mediapipe_pose", "--size", "64", "--prompt", PROMPT, "--out", "pairs")
    run("pairs", "--check", "pairs")
    pairs = read_pairs("pairs/mediapipe_pose")
    assert all(np.asarray(Image.open(pair.source)).any() for pair in pairs)

    run("adapt", "pairs/mediapipe_pose", "--control", "nano/base", "--name", "pose", "--steps", "100")
    file = "runs/pose/pose.safetensors"
    (report,) = run("evaluate", "control", file, "--pairs", "pairs/mediapipe_pose")["reports"]
    assert report["title"].startswith("mediapipe_pose: pose F1")

    def generated(image: Path, *options: str) -> np.ndarray:
        made = run("generate", PROMPT, "--control", f"{file}={image}", "--seeds", "4", *options)
        return np.stack([np.asarray(Image.open(path), float) for path in made["images"]])

    trained = split_pairs(pairs)[0]
    images = [np.asarray(Image.open(pair.target).convert("RGB"), float) for pair in trained]
    made = [generated(pair.source, "--prepared") for pair in trained]
    # The prompt is the same for all, so only the pose says which photograph is meant.
    apart = np.array([[np.abs(some - image).mean() for image in images] for some in made])
    assert (apart.argmin(axis=1) == range(len(trained))).all(), apart
    # A pose found while generating is the one that was trained on.
    np.testing.assert_array_equal(generated(trained[0].target), made[0])
