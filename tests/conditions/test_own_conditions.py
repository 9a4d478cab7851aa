"""A condition of one's own, in one file that the environment names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refusals import check

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_condition.py"


def controlkit(*words, files, cwd):
    return subprocess.run(
        [sys.executable, "-m", "controlkit", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "CONTROLKIT_CONDITIONS": os.pathsep.join(map(str, files))},
    )


@pytest.fixture
def image(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    Image.fromarray(np.repeat(np.tile(ramp, (48, 1))[..., None], 3, 2)).save(tmp_path / "ramp.png")
    return tmp_path / "ramp.png"


def test_the_example_is_a_condition_like_any_other(image, tmp_path):
    made = controlkit("condition", "dots", image, "--out", "out.png", "--set", "step=6", files=[EXAMPLE], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    assert drawn.shape == (48, 64)
    # Dark at the left, light at the right.
    assert drawn[:, :20].mean() < drawn[:, -20:].mean() - 80
    listed = controlkit("condition", "--list", "--json", files=[EXAMPLE], cwd=tmp_path)
    assert "halftone" in {entry["name"] for entry in json.loads(listed.stdout)}


def test_a_file_that_fails_is_named(tmp_path, image):
    (tmp_path / "broken.py").write_text("1 / 0")
    made = controlkit("condition", "--list", files=[tmp_path / "broken.py"], cwd=tmp_path)
    assert made.returncode == 2
    assert "broken.py" in made.stderr and "ZeroDivisionError" in made.stderr and "Traceback" not in made.stderr
    made = controlkit("condition", "--list", files=["nothing.py"], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "missing-file", "CONTROLKIT_CONDITIONS", "nothing.py")


def test_all_conditions_of_one_image_on_one_sheet(image, tmp_path):
    made = controlkit("condition", "all", image, "--out", "sheet.png", "--json", files=[], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert len(json.loads(made.stdout)["conditions"]) >= 25
    assert Image.open(tmp_path / "sheet.png").width > 900


def test_fields_under_their_former_names(tmp_path, image):
    path = tmp_path / "former.py"
    path.write_text("""
from controlkit.conditions.condition import condition, uniform_int
from controlkit.conditions.fidelity import PSNR

@condition("former", summary="s", fidelity=PSNR, draw={"n": uniform_int(1, 2)}, cuts=False, seen="at 64 x 64")
def former(image, *, n: int = 1):
    return image
""")
    made = controlkit("condition", "former", "--json", files=[path], cwd=tmp_path)
    facts = json.loads(made.stdout)
    assert facts["training"] == {"n": "integers, uniform from 1 to 2"}
    assert facts["cuts"] is False and facts["seen"] == "at 64 x 64"
