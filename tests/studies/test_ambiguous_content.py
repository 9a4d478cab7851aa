"""The study of ambiguous content at toy size."""

from __future__ import annotations

import sys

import pytest
import torch

from controlkit.formats.load import save_control
from controlkit.nano.evaluation_sets import read_set
from controlkit.studies import ambiguous_content
from controlkit.studies.ambiguous_content import AmbiguousContent, other_concepts, run_ambiguous_content
from refusals import refused


@pytest.fixture
def settings(tiny_base, tiny_control, base_folder, tmp_path):
    save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    return {
        "out": str(tmp_path / "study"),
        "base": str(base_folder),
        "controls": (str(tmp_path / "canny.safetensors"),),
        "images": 4,
        "sampling_steps": 2,
    }


@pytest.fixture
def features(monkeypatch):
    """Mean colours of the quarters in place of a network: true images find themselves."""

    def quarters(images):
        pixels = torch.stack([torch.from_numpy(image).float() for image in images]).movedim(-1, 1)
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1) - 127

    monkeypatch.setattr(ambiguous_content, "lite0_features", quarters)
    monkeypatch.setattr(ambiguous_content, "lite0", lambda: None)


def test_every_prompt_is_scored_and_the_study_resumes(settings, features, monkeypatch):
    made = run_ambiguous_content(AmbiguousContent(**settings))
    concepts, fidelity = made.reports
    (name,) = settings["controls"]
    assert [row[0] for row in concepts.rows][:3] == ["chance", "no control", name]
    assert concepts.rows[0][1:] == (0.1,) * 4 and concepts.rows[-1][-1] is None
    assert all(0 <= value <= 1 for row in concepts.rows[1:-1] for value in row[1:])
    assert concepts.facts["concepts"][name]["right"] == concepts.rows[2][2]
    assert concepts.settings["mode"] == "control" and len(set(concepts.settings["prompts"].values())) == 3
    assert [row[0] for row in fidelity.rows] == [name] and len(fidelity.rows[0]) == 4
    assert made.files["images"].is_file()

    def samples(*args, **more):
        raise AssertionError("a second run has nothing to sample")

    monkeypatch.setattr(ambiguous_content, "generate_controlled", samples)
    monkeypatch.setattr(ambiguous_content, "generate_uncontrolled", samples)
    assert run_ambiguous_content(AmbiguousContent(**settings)).reports == made.reports


def test_scores_tell_the_concept_of_the_image_from_that_of_the_prompt(settings, features, monkeypatch):
    """Without control, images of the prompt's concept; under it, the targets, whatever the prompt."""
    drawings = {drawing.caption: drawing.image for drawing in read_set("seen").examples}
    # The true images are their own gallery: these features do not recognise a concept elsewhere in the image.
    monkeypatch.setattr(ambiguous_content, "read_set", lambda name: read_set("seen"))
    targets = read_set("seen").images[: settings["images"]]
    blank = targets[0] * 0 + 127
    monkeypatch.setattr(
        ambiguous_content,
        "generate_uncontrolled",
        lambda base, prompts, steps: [drawings.get(prompt, blank) for prompt in prompts],
    )
    monkeypatch.setattr(ambiguous_content, "generate_controlled", lambda *args, **more: list(targets))
    monkeypatch.setattr(ambiguous_content, "reconstruct", lambda base, images: images)
    # Every caption of another concept must be one of the set: its style and colour are those of its own drawing.
    captions = {drawing.concept: drawing.caption for drawing in read_set("seen").examples}
    monkeypatch.setattr(ambiguous_content, "caption_of", lambda concept, style, colour: captions[concept])
    concepts, fidelity = run_ambiguous_content(AmbiguousContent(**settings, nearest=1)).reports
    rows = {row[0]: row[1:] for row in concepts.rows}
    (name,) = settings["controls"]
    empty, right, conflicting, followed = rows["no control"]
    assert right > max(empty, conflicting) and followed > conflicting
    assert rows[name][0] == rows[name][1] == rows[name][2] > rows[name][3]
    assert fidelity.rows[0][3] == pytest.approx(1)


def test_another_concept_is_another_one():
    known = ["a", "b", "c"]
    assert all(mine != other for mine, other in zip(known, other_concepts(known, known * 2), strict=True))


def test_more_nearest_concepts_than_there_are_are_refused_before_it_samples(settings, features, tmp_path):
    with refused("out-of-range", "nearest is 60", "1 to 50"):
        run_ambiguous_content(AmbiguousContent(**settings, nearest=60))
    assert not (tmp_path / "study").exists()


def test_what_it_cannot_do_is_refused_before_it_samples(settings, monkeypatch, tiny_base, tiny_control, tmp_path):
    with refused("out-of-range", "images", 0):
        AmbiguousContent(images=0)
    with refused("missing-setting", "controls"):
        AmbiguousContent(controls=())
    with refused("unknown-name", "prompt"):
        AmbiguousContent(mode="prompt")
    with refused("out-of-range", "images is 100000", "seen"):
        run_ambiguous_content(AmbiguousContent(**{**settings, "images": 100_000}))
    ambiguous_content.lite0.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with refused("missing-package", "controlkit[metrics]"):
        run_ambiguous_content(AmbiguousContent(**settings))
    assert not (tmp_path / "study").exists()
