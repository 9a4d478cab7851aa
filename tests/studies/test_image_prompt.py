"""The study of image prompts at toy size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from controlkit.controls.uni_controlnet import GlobalAdapter
from controlkit.formats.load import save_control
from controlkit.nano.evaluation_sets import read_set
from controlkit.studies import image_prompt as study
from controlkit.studies.image_prompt import CAPTION, EMPTY, NO_CONTROL, ImagePrompt, run_image_prompt
from refusals import refused


@pytest.fixture
def features(monkeypatch):
    """Colours of a coarse grid in place of a network: true images find themselves."""

    def grid(images):
        pixels = torch.stack([torch.from_numpy(image).float() for image in images]).movedim(-1, 1)
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1) - 127

    monkeypatch.setattr(study, "lite0_features", grid)


@pytest.fixture
def settings(tiny_base, base_folder, tmp_path, features):
    torch.manual_seed(0)
    path = save_control(tmp_path / "global.safetensors", GlobalAdapter.for_base(tiny_base), tiny_base)
    out = str(tmp_path / "study")
    return ImagePrompt(control=str(path), base=str(base_folder), out=out, images=3, sampling_steps=2)


def test_each_weight_is_scored_with_both_prompts_and_the_study_resumes(settings, monkeypatch):
    # The tiny base's autoencoder has random weights.
    monkeypatch.setattr(study, "reconstruct", lambda base, images: read_set("seen").first(len(images)).images)
    made = run_image_prompt(settings)
    (report,) = made.reports
    weights = (NO_CONTROL, 0.5, 1.0)
    assert [row[:2] for row in report.rows[:-1]] == [(prompt, w) for prompt in (EMPTY, CAPTION) for w in weights]
    assert report.rows[-1][3] == 0  # the images that results are compared with
    assert all(0 <= right <= 1 and distance > 0 for *_, right, distance in report.rows[:-1])
    distances = [row[3] for row in report.rows[:3]]
    assert len(set(distances)) == 3, "the weight changes results"
    assert report.facts["chance"] == 0.1
    assert [one["weight"] for one in report.settings["controls"]] == [0.5, 1.0] and "weight" not in report.settings
    assert made.files["images"].is_file()

    def samples(*_arguments, **_settings):
        raise AssertionError("nothing is sampled twice")

    monkeypatch.setattr(study, "generate_uncontrolled", samples)
    monkeypatch.setattr(study, "generate_controlled", samples)
    assert run_image_prompt(settings).reports == made.reports
    assert len(run_image_prompt(replace(settings, weights=(1.0,))).reports[0].rows) == 5


def test_what_makes_no_tokens_of_an_image_is_refused(settings, tiny_base, tiny_control, tmp_path):
    path = str(save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base))
    with refused("wrong-kind", path, "a ControlNet", "no tokens of one image"):
        run_image_prompt(replace(settings, control=path))
    with refused("out-of-range", "weights []"):
        replace(settings, weights=())
    with refused("out-of-range", "images is 201", "up to 200"):
        run_image_prompt(replace(settings, images=201))
