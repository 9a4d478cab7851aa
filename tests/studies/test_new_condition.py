"""The study of new conditions at toy size: every part runs, resumes, and says what does not reproduce."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from controlkit import progress
from controlkit.apps.cli import main
from controlkit.conditions import find
from controlkit.controls.ctrlora import BaseControlNet
from controlkit.data.pairs import read_pairs, write_pairs
from controlkit.evaluation.eval_set import EvalSet
from controlkit.evaluation.sampling import EvalControl, generate_controlled
from controlkit.evaluation.sets import evaluation_set
from controlkit.formats.load import load_control, save_control
from controlkit.nano.icons import IconSets, draw
from controlkit.studies.cells import Cell, Task, _score, _stored_cell
from controlkit.studies.new_condition import NewCondition, Trainings, run_new_condition
from controlkit.studies.new_condition_tables import ADAPTER, CONTROLNET, claims
from refusals import refused


@pytest.fixture
def settings(tiny_base, base_folder, icons_file, tmp_path):
    control = tmp_path / "base.safetensors"
    save_control(control, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
    return {
        "out": str(tmp_path / "study"),
        "base": str(base_folder),
        "control": str(control),
        "icons": str(icons_file),
        "conditions": ("palette",),
        "detail": "palette",
        "parts": ("rates", "budgets", "ablation", "ranks", "pairs"),
        "budgets": (1, 2),
        "pairs": 6,
        "batch_size": 2,
        "rank": 2,
        "ranks": (2, 3),
        "pair_counts": (4, 6),
        "detail_steps": 2,
        "rates": (1e-3,),
        "rate_steps": 1,
        "images": 2,
        "sampling_steps": 2,
    }


def test_a_study_does_not_begin_when_its_figure_cannot_be_drawn(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused("missing-package", "controlkit[studies]"):
        run_new_condition(NewCondition(**settings))
    assert not Path(settings["out"]).exists()


def test_every_part_runs_once_and_resumes(settings, tmp_path, capsys):
    study = run_new_condition(NewCondition(**settings))
    assert {report.title.split(":")[0].split(",")[0] for report in study.reports} == {
        "Learning rates",
        "Gap closed by number of steps",
        "Does it reproduce? The adapter is",
        "Ablation on palette",
        "Rank",
        "Pairs",
    }
    adapter = next(cell for cell in study.cells if cell.method == ADAPTER)
    controlnet = next(cell for cell in study.cells if cell.method == CONTROLNET)
    assert adapter.parameters < controlnet.parameters
    assert all(path.is_file() for path in study.files.values())
    assert "| palette: adapter |" in study.files["table"].read_text()
    assert "mode balanced, weight 1, guidance 3, 2 ddim steps" in study.files["table"].read_text()

    capsys.readouterr()
    again = run_new_condition(NewCondition(**settings))
    assert again.cells == study.cells
    assert "steps" not in capsys.readouterr().err
    # A part alone leaves the table of all parts.
    before = study.files["table"].read_text()
    alone = run_new_condition(NewCondition(**{**settings, "parts": ("ranks",)})).files["table"]
    assert alone != study.files["table"] and study.files["table"].read_text() == before


def test_tables_hold_numbers_and_what_they_depend_on(settings, tiny_base):
    parts = ("rates", "ablation", "ranks", "pairs")
    settings = {**settings, "parts": parts, "budgets": (1,), "detail_steps": 1, "ranks": (2,), "pair_counts": (4,)}
    made = run_new_condition(NewCondition(**settings, mode="control"))
    for report in made.reports:
        kept = report.to_json()["settings"]
        assert kept["mode"] == "control" and kept["steps"] == 2 and kept["sampler"] == "ddim"
        assert kept["base"]["fingerprint"] == tiny_base.fingerprint
        assert kept["base_control"]["fingerprint"]
        assert kept["study"]["budgets"] == (1,)
        assert kept["tasks"]["palette, 6 pairs"]["sets"][0]["images"] == 2
        assert kept["tasks"]["palette, 6 pairs"]["condition"]["parameters"]
        json.dumps(kept, default=str)
    rows = {report.title.split(":")[0].split(",")[0]: report.rows for report in made.reports}
    for title in ("Rank", "Pairs", "Learning rates", "Ablation on palette"):
        words = [cell for row in rows[title] for cell in row if isinstance(cell, str)]
        assert not any(character.isdigit() for word in words for character in word), words
    kept = json.loads(next(Path(settings["out"]).glob("results-*/*.json")).read_text())
    assert kept["settings"]["mode"] == "control" and kept["settings"]["recipe"]["system"]


def test_every_mode_has_numbers_of_its_own_from_the_same_training(settings, capsys):
    settings = {**settings, "parts": ("budgets",), "budgets": (3,), "images": 4}
    balanced = run_new_condition(NewCondition(**settings)).cells
    capsys.readouterr()
    control = run_new_condition(NewCondition(**settings, mode="control")).cells
    assert "step 1/3" not in capsys.readouterr().err
    assert [cell.run for cell in control] == [cell.run for cell in balanced]
    assert [cell.baseline for cell in control] == [cell.baseline for cell in balanced]
    assert [cell.score for cell in control] != [cell.score for cell in balanced]


def test_pairs_of_ones_own_are_studied_and_judged_on_their_held_out_tenth(
    settings, icons_file, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "mine"
    drawings = [draw(icon, np.random.default_rng(0)) for icon in IconSets(icons_file).icons[:10]]
    write_pairs(folder, [(drawing.image, drawing.image, drawing.caption) for drawing in drawings])
    command = ["study", "new-condition", "--given", f"mine={folder}@canny", "--json"]
    changes = {**settings, "conditions": [], "detail": "mine", "parts": ["budgets"], "budgets": [1]}
    command += [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert {cell["task"] for cell in made["cells"]} == {"mine"}
    assert {cell["pairs"] for cell in made["cells"]} == {9}
    assert len(read_pairs(folder)) == 10
    monkeypatch.setattr(progress, "_SILENT", 0)
    assert main([*command, "--verbose"]) == 0
    assert "3 of 3 cells of the study" in capsys.readouterr().err


def test_numbers_of_pairs_of_ones_own_are_numbers_trained_on(settings, icons_file, tmp_path):
    folder = tmp_path / "mine"
    drawings = [draw(icon, np.random.default_rng(0)) for icon in IconSets(icons_file).icons[:10]]
    write_pairs(folder, [(drawing.image, drawing.image, drawing.caption) for drawing in drawings])
    changes = {"conditions": (), "detail": "mine", "given": (f"mine={folder}@canny",), "parts": ("pairs",)}
    settings = {**settings, **changes, "detail_steps": 1}
    study = run_new_condition(NewCondition(**{**settings, "pair_counts": (3, 6, 9)}))
    assert [cell.pairs for cell in study.cells] == [3, 6, 9]
    assert [row[0] for row in study.reports[0].rows] == [3, 6, 9]
    assert len({cell.run for cell in study.cells}) == 3
    images = {str(task["sets"]) for task in study.reports[0].settings["tasks"].values()}
    assert len(images) == 1  # all are evaluated on the same
    before = sorted(Path(settings["out"]).rglob("*"))
    with refused("out-of-range", "pair_counts", "10", folder, "9 pairs"):
        run_new_condition(NewCondition(**{**settings, "pair_counts": (3, 10)}))
    assert sorted(Path(settings["out"]).rglob("*")) == before


def test_wrong_settings_are_refused_before_anything_runs(settings):
    for change, code, facts in (
        ({"parts": ("budget",)}, "unknown-name", ["'budget'", "budgets"]),
        ({"detail": "canny"}, "unknown-name", ["detail", "'canny'", "palette"]),
        ({"given": ("folder",)}, "usage", ["'folder'", "NAME=FOLDER"]),
        ({"budgets": ()}, "out-of-range", ["budgets", "at least 1"]),
        ({"parts": ()}, "missing-setting", ["parts", "budgets"]),
        ({"pairs": 1}, "out-of-range", ["pairs", "at least 2"]),
        ({"pair_counts": (1, 4)}, "out-of-range", ["pair_counts", "at least 2"]),
        ({"parts": ("ranks",), "ranks": ()}, "missing-setting", ["ranks"]),
        ({"parts": ("pairs",), "pair_counts": ()}, "missing-setting", ["pair_counts", "pairs"]),
        ({"sampling_steps": 1001}, "out-of-range", ["sampling_steps", "1001", "1000"]),
        ({"given": ("palette=folder",)}, "contradiction", ["palette"]),
        ({"mode": "control-net"}, "unknown-name", ["'control-net'", "did you mean control"]),
    ):
        with refused(code, *facts):
            NewCondition(**{**settings, **change})


def test_a_control_that_is_no_base_control_is_refused_before_anything_runs(settings, tiny_base, tiny_control, tmp_path):
    path = save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    with refused("wrong-kind", path, "ControlNet", "base control", "nano/base"):
        run_new_condition(NewCondition(**{**settings, "control": str(path)}))
    assert not Path(settings["out"]).exists()


def test_the_adapter_at_step_0_is_the_base_control_alone(settings):
    few = {**settings, "parts": ("budgets",), "budgets": (1,)}
    made = run_new_condition(NewCondition(**few))
    untrained = next(cell for cell in made.cells if not cell.steps)
    trainings = Trainings(NewCondition(**few))
    task, base = trainings.task("palette", 6), trainings.base
    control = load_control(settings["control"], base)
    use = EvalControl(control=control, condition_images=task.eval_set.condition_images, mode="balanced")
    images = generate_controlled(base, [use], task.eval_set.prompts, steps=2)
    assert untrained.score == pytest.approx(_score(task, images), abs=1e-6)
    assert untrained.seconds == 0 and untrained.method == ADAPTER
    table = made.reports[0]
    assert table.columns[1:] == ("0", "1") and table.rows[1][1] is None
    # Through the autoencoder of the tiny base, whose weights are random, there may be no gap.
    assert table.rows[0][1] == pytest.approx(untrained.gap_closed, nan_ok=True)


def test_more_images_than_there_are_are_refused_before_training(settings):
    with refused("out-of-range", "images", 100_000, len(evaluation_set("held-out").examples)):
        run_new_condition(NewCondition(**{**settings, "images": 100_000}))
    assert not list(Path(settings["out"]).glob("runs/*"))


def test_a_claim_that_fails_is_said_to_fail():
    def cell(method, steps, score):
        parameters = 10 if method == ADAPTER else 200
        return Cell(
            task="palette",
            method=method,
            rank=None,
            pairs=6,
            steps=steps,
            rate=1e-3,
            score=score,
            baseline=0.0,
            ceiling=1.0,
            higher_is_better=True,
            parameters=parameters,
            run="r",
            seconds=1.0,
        )

    good = [cell(ADAPTER, 100, 0.5), cell(CONTROLNET, 100, 0.1), cell(ADAPTER, 500, 0.4), cell(CONTROLNET, 500, 0.6)]
    untrained = cell(ADAPTER, 0, 0.2)
    assert claims([untrained, *good]) == {
        "ahead at every budget up to 250 steps": {"palette": True},
        "level (within 0.02) or ahead at 500 steps": {"palette": False},
        "at most a tenth of the parameters": {"palette": True},
        "gap closed at least 0.5 after 500 steps": {"palette": False},
    }


def test_other_images_are_other_numbers_and_a_budget_of_a_part_has_a_run_of_its_own(settings, capsys):
    small = {**settings, "parts": ("budgets", "ranks"), "budgets": (2,), "detail_steps": 1, "ranks": (2,)}
    first = run_new_condition(NewCondition(**small))
    assert [cell.steps for cell in first.cells] == [0, 2, 2, 1]
    states = {path: path.read_bytes() for path in Path(settings["out"]).rglob("state.safetensors")}
    capsys.readouterr()
    table = first.files["table"].read_text()
    assert "images 2" in table and "budgets [2]" in table
    second = run_new_condition(NewCondition(**{**small, "images": 1}))
    assert first.files["table"].read_text() == table and "images 1" in second.files["table"].read_text()
    assert [cell.score for cell in first.cells] != [cell.score for cell in second.cells]
    # The same training is evaluated again.
    assert [cell.run for cell in first.cells] == [cell.run for cell in second.cells]
    assert {path: path.read_bytes() for path in Path(settings["out"]).rglob("state.safetensors")} == states
    assert all(b.seconds >= a.seconds for a, b in zip(first.cells, second.cells, strict=True))
    again = run_new_condition(NewCondition(**small))
    assert again.cells == first.cells
    folder = next((Path(settings["out"]) / "pairs").iterdir())
    write_pairs(folder, [(pair.images(64)[0], pair.images(64)[1], "other") for pair in read_pairs(folder)])
    capsys.readouterr()
    run_new_condition(NewCondition(**small))
    assert "palette: adapter, 2 steps" in capsys.readouterr().err


def test_nothing_is_claimed_of_budgets_that_were_not_run():
    def cell(method):
        numbers = {"steps": 500, "rate": 1e-3, "score": 0.5, "baseline": 0.0, "ceiling": 1.0, "seconds": 1.0}
        same = {"rank": None, "pairs": 6, "higher_is_better": True, "parameters": 10, "run": "r"}
        return Cell(task="palette", method=method, **same, **numbers)

    assert not [claim for claim in claims([cell(ADAPTER), cell(CONTROLNET)]) if "up to 250" in claim]


def test_pairs_that_changed_are_learned_from_the_beginning(settings):
    small = {**settings, "parts": ("ranks",), "detail_steps": 2, "ranks": (2,)}
    run_new_condition(NewCondition(**small))
    folder = next((Path(settings["out"]) / "pairs").iterdir())
    write_pairs(folder, [(255 - pair.images(64)[0], pair.images(64)[1], pair.prompt) for pair in read_pairs(folder)])
    run_new_condition(NewCondition(**small))
    first, second = (path for path in (Path(settings["out"]) / "runs").glob("*/*"))
    assert (first / "state.safetensors").read_bytes() != (second / "state.safetensors").read_bytes()


def test_a_cell_of_an_earlier_version_has_the_direction_of_its_settings(tmp_path):
    numbers = {"steps": 5, "rate": 1e-3, "score": 2.0, "baseline": 3.0, "ceiling": 1.0, "seconds": 1.0}
    of_cell = {"task": "palette", "method": ADAPTER, "rank": 4, "pairs": 6, "parameters": 10, "run": "r", **numbers}
    path = tmp_path / "cell.json"
    path.write_text(json.dumps({**of_cell, "settings": {"condition": {"higher_is_better": False}}}))
    cell = _stored_cell(path)
    assert cell is not None and cell.gap_closed == 0.5


def test_a_damaged_file_of_a_cell_is_measured_again(settings, capsys):
    small = {**settings, "parts": ("ranks",), "detail_steps": 1, "ranks": (2,)}
    (cell,) = run_new_condition(NewCondition(**small)).cells
    path = next(Path(settings["out"]).glob("results-*/*.json"))
    for damaged in ('{"task": "palette"}', "[]", "{"):
        path.write_text(damaged)
        capsys.readouterr()
        (again,) = run_new_condition(NewCondition(**small)).cells
        assert replace(again, seconds=cell.seconds) == cell
        assert str(path) in capsys.readouterr().err


def test_paths_may_be_spelled_in_several_ways(settings, tmp_path, monkeypatch, capsys):
    small = {**settings, "parts": ("ranks",), "detail_steps": 1, "ranks": (2,)}
    monkeypatch.chdir(tmp_path)
    first = run_new_condition(NewCondition(**{**small, "out": "study", "control": "base.safetensors"})).cells
    capsys.readouterr()
    absolute = {"out": str(tmp_path / "study"), "control": str(tmp_path / "base.safetensors")}
    for paths in (absolute, {"out": "./study/../study", "control": f"../{tmp_path.name}/base.safetensors"}):
        assert run_new_condition(NewCondition(**{**small, **paths})).cells == first
    assert "steps" not in capsys.readouterr().err
    more = run_new_condition(NewCondition(**{**small, **absolute, "images": 1})).cells  # of the same run
    assert [cell.run for cell in more] == [cell.run for cell in first]


def test_a_budget_between_two_that_were_run_is_run_too(settings):
    small = {**settings, "parts": ("budgets",), "detail_steps": 3}
    run_new_condition(NewCondition(**{**small, "budgets": (1, 3)}))
    cells = run_new_condition(NewCondition(**{**small, "budgets": (1, 2, 3)})).cells
    assert [cell.steps for cell in cells if cell.method == ADAPTER] == [0, 1, 2, 3]


def test_another_batch_size_has_runs_of_its_own(settings):
    small = {**settings, "parts": ("ranks",), "detail_steps": 1, "ranks": (2,)}
    (first,) = run_new_condition(NewCondition(**small)).cells
    (second,) = run_new_condition(NewCondition(**{**small, "batch_size": 3})).cells
    assert first.run != second.run
    assert run_new_condition(NewCondition(**small)).cells == (first,)


def test_pairs_of_other_icons_are_not_taken_for_these(settings, icons_file, tmp_path):
    small = {**settings, "parts": ("ranks",), "ranks": (2,)}
    run_new_condition(NewCondition(**small))
    other = tmp_path / "other.npz"
    with np.load(icons_file) as arrays:
        np.savez(other, **arrays)
    pairs = Path(settings["out"]) / "pairs"
    with refused("resume-mismatch", pairs / "palette-6", other):
        run_new_condition(NewCondition(**{**small, "icons": str(other)}))
    # Among more pairs, the same folder lists the first of them.
    more = {**small, "parts": ("ranks", "pairs"), "pair_counts": (8,), "icons": str(other)}
    with refused("resume-mismatch", pairs / "palette-6", other):
        run_new_condition(NewCondition(**more))
    assert not (pairs / "palette-8").exists()


def test_pairs_that_are_listed_from_others_record_their_icons(settings, icons_file, tmp_path):
    small = {**settings, "parts": ("pairs",), "pair_counts": (4,), "detail_steps": 1}
    run_new_condition(NewCondition(**small))
    pairs = Path(settings["out"]) / "pairs"
    other = tmp_path / "other.npz"
    with np.load(icons_file) as arrays:
        np.savez(other, **arrays)
    shutil.rmtree(pairs / "palette-6")
    with refused("resume-mismatch", pairs / "palette-4", other):
        run_new_condition(NewCondition(**{**small, "icons": str(other)}))


def test_cells_are_of_one_base_with_all_its_parts_and_of_one_base_control(settings, tiny_base, tmp_path):
    small = {**settings, "parts": ("budgets",), "budgets": (1,)}
    base = tmp_path / "other"
    shutil.copytree(settings["base"], base)
    control = Path(settings["control"])
    without_metadata = load_file(control)
    save_file(without_metadata, control)  # whose fingerprint is computed

    def results():
        run_new_condition(NewCondition(**{**small, "base": str(base)}))
        return {path.name for path in Path(settings["out"]).glob("results-*")}

    first = results()
    assert results() == first and len(first) == 1
    weights = base / "text_encoder" / "model.safetensors"
    save_file({name: 1.5 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert len(results()) == 2
    save_file({name: 1.5 * value for name, value in without_metadata.items()}, control)
    assert len(results()) == 3


def test_recorded_parameters_of_a_condition_count_in_the_score_and_in_the_key_of_a_cell(tiny_base, tmp_path):
    condition = find("pixel")
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    write_pairs(tmp_path, [(image, image, "x")])

    def task(parameters):
        source = condition(image, **parameters)
        held_out = EvalSet(
            name="held-out", targets=[image], prompts=["x"], condition_images=[source], parameters=[parameters]
        )
        return Task(name="pixel", condition=condition, pairs=tmp_path, held_out=0.1, eval_set=held_out)

    recorded = task({"cells": 8})
    of_another = replace(recorded, eval_set=replace(recorded.eval_set, parameters=None))
    assert _score(recorded, [image]) < _score(of_another, [image])  # a distance
    same = replace(recorded, eval_set=replace(recorded.eval_set, parameters=[{"cells": 9}]))
    assert recorded.images_content != same.images_content
    assert recorded.pairs_content == same.pairs_content
