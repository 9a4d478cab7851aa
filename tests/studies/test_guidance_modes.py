"""Every guidance mode on the same seeds, at toy size."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
from PIL import Image

from controlkit.controls.controlnet_xs import ControlNetXS
from controlkit.formats.load import save_control
from controlkit.sampling.uses import MODES
from controlkit.studies import guidance_modes as study
from controlkit.studies.guidance_modes import GuidanceModes, run_guidance_modes
from refusals import refused


@pytest.fixture
def settings(tiny_base, tiny_control, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_control, "condition", "canny")
    # Through the autoencoder of the tiny base, whose weights are random, targets may score no better than without
    # control: there would be no gap.
    monkeypatch.setattr(study, "reconstruct", lambda base, images: list(images))
    path = save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    return GuidanceModes(
        out=str(tmp_path / "study"), base=str(base_folder), control=str(path), images=2, sampling_steps=2
    )


def test_each_mode_is_sampled_once_under_both_prompts_and_shown(settings, monkeypatch):
    calls = []
    controlled = study.generate_controlled
    monkeypatch.setattr(
        study, "generate_controlled", lambda *args, **more: calls.append(1) or controlled(*args, **more)
    )
    result = run_guidance_modes(settings)
    (report,) = result.reports
    assert [row[:2] for row in report.rows] == [
        (prompt, mode) for prompt in ("empty prompt", "full prompt") for mode in MODES
    ]
    assert all(math.isfinite(value) for row in report.rows for value in row[2:])
    assert len(calls) == 2 * len(MODES)
    with Image.open(result.files["images"]) as sheet:
        assert sheet.height > (2 * len(MODES) + 4) * 80 and sheet.width > 2 * 80
    assert run_guidance_modes(settings).reports[0].rows == report.rows
    assert len(calls) == 2 * len(MODES)


def test_modes_by_the_names_of_other_tools(settings):
    assert GuidanceModes(modes=("Balanced", "guess_mode")).modes == ("balanced", "guess")
    with refused("unknown-name", "'guessing'"):
        GuidanceModes(modes=("guessing",))
    with refused("out-of-range", "modes"):
        GuidanceModes(modes=())


def test_a_control_without_residuals_is_refused(tiny_base, base_folder, tmp_path):
    control = ControlNetXS.for_base(tiny_base, "canny", size_ratio=0.5)
    path = save_control(tmp_path / "inside.safetensors", control, tiny_base)
    with refused("unsupported", control.title):
        run_guidance_modes(GuidanceModes(out=str(tmp_path / "s"), base=str(base_folder), control=str(path), images=1))


def test_a_control_of_another_configuration_is_sampled_anew(settings, tiny_base, tiny_control, monkeypatch):
    calls = []
    controlled = study.generate_controlled
    monkeypatch.setattr(
        study, "generate_controlled", lambda *args, **more: calls.append(1) or controlled(*args, **more)
    )
    settings = replace(settings, modes=("control",))
    run_guidance_modes(settings)
    before = len(calls)
    run_guidance_modes(settings)
    assert len(calls) == before
    pooled = copy.deepcopy(tiny_control)
    pooled.network.register_to_config(global_pool_conditions=True)
    save_control(settings.control, pooled, tiny_base)
    run_guidance_modes(settings)
    assert len(calls) == 2 * before
