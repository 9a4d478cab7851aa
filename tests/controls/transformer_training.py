"""The check of a ControlNet of a transformer from the command line, for each family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.formats.load import load_control
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse


def check_training(folder: Path, tmp_path: Path, *, trains: str = "controlnet_blocks", **own: str) -> None:
    """Train a control from pairs, resume, load and use it.

    Args:
        folder: a tiny base.
        trains: part of the names of layers that are zero before training.
        own: settings of the recipe, among them `system`.
    """
    pairs, rows = tmp_path / "pairs", []
    generator = np.random.default_rng(0)
    for number in range(6):
        blocks = generator.integers(0, 256, (6, 6, 3), np.uint8)
        row = {"text": "red apple", "file_name": f"images/{number}.png", "canny": f"canny/{number}.png"}
        for name, image in (
            (row["file_name"], blocks),
            (row["canny"], np.where(blocks > 128, 255, 0).astype(np.uint8)),
        ):
            (pairs / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((64, 64)).save(pairs / name)
        rows.append(json.dumps(row))
    (pairs / "metadata.jsonl").write_text("\n".join(rows))
    settings = {"base": folder, "pairs": pairs, "out": tmp_path / "run", "name": "mine", "condition": "canny", **own}
    settings |= {"batch_size": 2, "log_every": 1, "learning_rate": 0.01, "device": "cpu"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    for steps in (2, 4):
        assert main(["train", str(recipe), "--set", f"steps={steps}", "--set", "score_pictures=2"]) == 0
    base = load_base(folder)
    control = load_control(tmp_path / "run" / "mine.safetensors", base)
    assert control.condition == "canny"
    assert any(value.abs().max() > 0 for name, value in control.file_state().items() if trains in name)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    use = ControlUse(control=str(tmp_path / "run" / "mine.safetensors"), image=str(pairs / "images" / "0.png"))
    made = generate(GenerateRequest(prompt="red apple", base=str(folder), controls=(use,), steps=2))
    plain = generate(GenerateRequest(prompt="red apple", base=str(folder), steps=2))
    assert made.images[0].image.tobytes() != plain.images[0].image.tobytes()
