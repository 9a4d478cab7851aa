"""Instructions of a UniControl's tasks, and a HyperNet trained and frozen, at toy size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from controlkit.apps.cli import main
from controlkit.controls.unicontrol import UniControl
from controlkit.formats.load import save_control
from controlkit.studies import task_instructions as study
from controlkit.studies.task_instructions import TaskInstructions, run_task_instructions
from refusals import refused


@pytest.fixture
def files(tiny_base, tmp_path):
    """Two controls that change images."""
    tasks = {"palette": "palette to image", "canny": "canny edge to image"}
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        control = UniControl.for_base(tiny_base, tasks=tasks)
        with torch.no_grad():
            for parameter in control.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        paths.append(str(save_control(tmp_path / f"{seed}.safetensors", control, tiny_base)))
    return paths


@pytest.fixture
def settings(files, base_folder, tmp_path, monkeypatch):
    control, frozen = files
    # Through the autoencoder of the tiny base, whose weights are random, targets score no better than without control.
    monkeypatch.setattr(study, "reconstruct", lambda base, images: list(images))
    out = str(tmp_path / "study")
    return TaskInstructions(
        control=control, frozen=frozen, base=str(base_folder), out=out, images=3, sampling_steps=2, resamples=200
    )


@pytest.fixture
def sampled(monkeypatch):
    """How many controls acted, for each sampling under control."""
    calls = []
    generate = study.generate_controlled

    def counted(base, uses, *arguments, **settings):
        calls.append(len(uses))
        return generate(base, uses, *arguments, **settings)

    monkeypatch.setattr(study, "generate_controlled", counted)
    return calls


def test_it_compares_instructions_and_hypernets_and_samples_nothing_twice(settings, sampled, tmp_path):
    result = run_task_instructions(settings)
    swapped, together, compared = result.reports
    assert [row[0] for row in swapped.rows] == ["palette", "canny"]
    assert [row[:2] for row in together.rows] == [("palette", "canny"), ("canny", "palette")]
    assert [row[0] for row in compared.rows] == ["palette", "canny", "mean"]
    # Two conditions under two instructions, a pair under two, and the other file's two; the rest is the first's.
    assert sorted(sampled) == [1] * 6 + [2] * 2
    for name, trained, frozen, difference, low, high in compared.rows:
        assert difference == pytest.approx(trained - frozen), name
        assert low <= high
    own = {row[0]: row[1] for row in swapped.rows}
    assert all(row[1] == pytest.approx(own[row[0]]) for row in compared.rows[:2])
    assert compared.facts["trained"] == pytest.approx(np.mean(list(own.values())))
    assert result.files["images"].is_file()
    sampled.clear()
    again = run_task_instructions(replace(settings, resamples=300))
    assert sampled == [] and again.reports[0].rows == swapped.rows


def test_without_a_gap_there_is_neither_a_difference_nor_an_interval(settings, monkeypatch):
    black = [np.zeros((64, 64, 3), np.uint8)] * settings.images
    monkeypatch.setattr(study, "generate_uncontrolled", lambda *_: black)
    monkeypatch.setattr(study, "reconstruct", lambda *_: black)
    compared = run_task_instructions(settings).reports[2]
    assert np.isnan([row[1:] for row in compared.rows]).all()


def test_without_a_frozen_one_nothing_is_compared(settings, files):
    assert len(run_task_instructions(replace(settings, frozen=None)).reports) == 2
    (row, *_) = run_task_instructions(replace(settings, frozen=files[0])).reports[2].rows[2:]
    assert row[3:] == (0, 0, 0)


def test_what_cannot_be_compared_is_refused(settings, tiny_base, tmp_path):
    other = UniControl.for_base(tiny_base, tasks={"palette": "x", "blur": "y"})
    path = str(save_control(tmp_path / "other.safetensors", other, tiny_base))
    with refused("contradiction", path, "palette, blur"):
        run_task_instructions(replace(settings, frozen=path))
    single = UniControl.for_base(tiny_base, "canny")
    path = str(save_control(tmp_path / "single.safetensors", single, tiny_base))
    with refused("wrong-kind", path, "several conditions"):
        run_task_instructions(replace(settings, control=path))
    with refused("contradiction", "'canny+depth'", "palette, canny"):
        run_task_instructions(replace(settings, pairs=("canny+depth",)))
    with refused("out-of-range", "images 1"):
        replace(settings, images=1)


def test_the_verb_lists_it(capsys):
    assert main(["study", "--list"]) == 0
    assert "task-instructions" in capsys.readouterr().out
