"""The study of convergence at toy size."""

from __future__ import annotations

import json
import math

import pytest
import torch

from controlkit.controls.ctrlora import BaseControlNet
from controlkit.formats.load import save_control
from controlkit.studies.cells import Cell
from controlkit.studies.convergence import METHODS, Convergence, run_convergence, steps_to, tables
from controlkit.studies.new_condition import Trainings
from refusals import refused


def cell(steps: int, closed: float, task: str = "palette", method: str = METHODS[0]) -> Cell:
    values = {"rank": 4, "pairs": 6, "rate": 1e-3, "baseline": 0.0, "ceiling": 1.0, "parameters": 1, "seconds": 1.0}
    return Cell(task=task, method=method, steps=steps, score=closed, higher_is_better=True, run="run", **values)


@pytest.fixture
def settings(tiny_base, base_folder, icons_file, tmp_path):
    control = tmp_path / "base.safetensors"
    torch.manual_seed(0)
    save_control(control, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
    return {
        "out": str(tmp_path / "study"),
        "base": str(base_folder),
        "control": str(control),
        "icons": str(icons_file),
        "colour": ("palette",),
        "spatial": ("sketch",),
        "budgets": (1, 2),
        "pairs": 4,
        "batch_size": 2,
        "rank": 2,
        "images": 2,
        "sampling_steps": 2,
    }


def test_it_trains_both_kinds_and_resumes(settings, capsys, monkeypatch):
    # Between images of two steps the gap is next to nothing, and its share may be any number.
    monkeypatch.setattr(Cell, "gap_closed", property(lambda self: 0.1 * self.steps))
    made = run_convergence(Convergence(**settings))
    assert {(each.task, each.method, each.steps) for each in made.cells} == {
        (task, method, steps)
        for task in ("palette", "sketch")
        for method in METHODS
        for steps in ((0, 1, 2) if method == METHODS[0] else (1, 2))
    }
    steps, claims, curves = made.reports
    assert [row[:2] for row in steps.rows] == [
        ("palette", "colour"),
        ("sketch", "spatial"),
        ("median, colour", "colour"),
        ("median, spatial", "spatial"),
    ]
    assert steps.rows[0][2:] == ("over 2", "over 2") and set(claims.rows[0][1:]) == {"undecided"}
    assert len(curves.rows) == 4 and None not in curves.rows[0] and curves.rows[1][1] is None
    assert steps.settings["mode"] == "control" and steps.settings["study"]["colour"] == ("palette",)
    assert steps.settings["tasks"]["palette, 4 pairs"]["condition"]["name"] == "palette"
    assert all(path.is_file() for path in made.files.values())
    json.dumps(made.to_json(), default=str)
    capsys.readouterr()
    assert run_convergence(Convergence(**settings)).cells == made.cells
    assert "steps" not in capsys.readouterr().err


def test_a_control_that_is_past_the_share_trains_no_further(settings, monkeypatch):
    monkeypatch.setattr(Cell, "gap_closed", property(lambda self: (0.2, 0.6, 0.7)[self.steps]))
    made = run_convergence(Convergence(**settings))
    assert {each.steps for each in made.cells} == {0, 1}
    assert made.reports[0].rows[0][2:] == ("at most 1", "at most 1")
    assert made.reports[2].rows[0][1:] == (0.2, 0.6, None)


def test_where_the_base_control_alone_is_past_the_share_no_adapter_trains(settings, monkeypatch):
    monkeypatch.setattr(Cell, "gap_closed", property(lambda self: 0.6))
    made = run_convergence(Convergence(**settings))
    assert {(each.method, each.steps) for each in made.cells} == {(METHODS[0], 0), (METHODS[1], 1)}
    assert made.reports[0].rows[0][2:] == (0, "at most 1")
    assert made.reports[0].facts["steps"][f"palette: {METHODS[0]}"] == 0
    assert all(path.is_file() for path in made.files.values())


def test_a_condition_without_a_gap_is_refused_before_the_others_train_on(settings, monkeypatch):
    monkeypatch.setattr(Cell, "gap_closed", property(lambda self: math.nan if self.task == "sketch" else 0.1))
    monkeypatch.setattr(Trainings, "cell", lambda *_, **__: pytest.fail("a control trained"))
    with refused("unsupported", "sketch", "no gap"):
        run_convergence(Convergence(**settings))


def test_steps_lie_between_two_budgets_on_a_logarithmic_scale():
    run = [cell(10, 0.0), cell(40, 0.2), cell(160, 0.6)]
    assert steps_to(run, 0.4) == pytest.approx(80)
    assert steps_to(run[::-1], 0.2) == pytest.approx(40)
    assert steps_to(run, 0.0) == 10
    assert math.isinf(steps_to(run, 0.7))
    untrained = cell(0, 0.1)
    assert steps_to([untrained, *run], 0.05) == 0
    assert steps_to([untrained, cell(10, 0.2)], 0.15) == 10


def test_medians_tell_whether_colour_is_slower():
    reached = {("sketch", METHODS[0]): 10, ("palette", METHODS[1]): 10}
    cells = [
        cell(steps, 1.0 if steps >= reached.get((task, method), 40) else 0.0, task, method)
        for task in ("palette", "sketch")
        for method in METHODS
        for steps in (10, 40)
    ]
    settings = Convergence(colour=("palette",), spatial=("sketch",), budgets=(10, 40))
    steps, claims, _ = tables(cells, settings)
    assert steps.facts["colour_is_slower"] == {METHODS[0]: True, METHODS[1]: False}
    assert claims.rows[0][1:] == ("yes", "NO")


def test_contradictions_are_refused():
    with refused("missing-setting", "colour"):
        Convergence(colour=())
    with refused("out-of-range", "share", 1.0):
        Convergence(share=1.0)
    with refused("out-of-range", "budgets"):
        Convergence(budgets=())
    with refused("unknown-name", "pallete"):
        Convergence(colour=("pallete",))
    with refused("out-of-range", "pairs is 1", "at least 2"):
        Convergence(pairs=1)
