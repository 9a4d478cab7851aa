"""The chart of quality against cost, and the time of a training step that its table has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "nano"))

import chart
import measuring_steps


def entry(once, each, gap):
    facts = {images: {"gap_closed": gap} for images in ("held-out", "openmoji")}
    return {"gflop": [once, each], "reports": [{"facts": facts}]}


def test_what_runs_once_costs_once():
    assert chart.gflop_of_image(entry(0.3, 0, 1)) == pytest.approx(0.3)
    assert chart.gflop_of_image(entry(0.3, 0.1, 1)) == pytest.approx(0.3 + 20 * 0.1)


def test_the_chart_shows_whichever_systems_were_measured(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {"controlnet": entry(0.01, 0.17, 0.99), "controlnet-mlp": entry(0.014, 0, 0.6), "shipped": entry(0, 1, 1)}
    for name in ("few.png", "many.png"):
        chart.draw_systems(runs, tmp_path / name)
        runs |= {name: entry(0.2, 0, 0.8) for name in chart.LADDER}
    few, many = (Image.open(tmp_path / name) for name in ("few.png", "many.png"))
    assert few.size == many.size and few.tobytes() != many.tobytes()


def test_the_time_of_a_step_survives_pauses_and_resumes(tmp_path):
    log = tmp_path / "log.jsonl"
    # Two seconds a step; one pause of ten minutes; a second part whose time starts anew.
    times = [(10, 20.0), (20, 40.0), (30, 640.0), (40, 660.0), (50, 20.0), (60, 40.0)]
    log.write_text("".join(json.dumps({"step": step, "seconds": seconds}) + "\n" for step, seconds in times))
    assert measuring_steps._seconds_of_a_step(log) == pytest.approx(2)
