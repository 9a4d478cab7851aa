"""Prompt modes: none, default, automatic, given."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from controlkit.apps.cli import main
from controlkit.bases.defaults import DEFAULT_PROMPT
from controlkit.bases.load import load_base
from controlkit.evaluation.sets import evaluation_set
from controlkit.sampling import prompts
from controlkit.sampling.generate import generate
from controlkit.sampling.prompts import find_captioner, register_captioner
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import read_settings
from refusals import check, refused
from tiny_blip import save_tiny_blip


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory):
    return save_tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def colours(monkeypatch):
    """A captioner that names the strongest channel, and remembers what it saw."""
    prompts._load()
    monkeypatch.setattr(prompts, "_REGISTRY", dict(prompts._REGISTRY))
    seen = []

    def load():
        def caption(images):
            seen.append([np.asarray(image) for image in images])
            return [f"{('red', 'green', 'blue')[np.asarray(image).mean((0, 1)).argmax()]} apple" for image in images]

        return caption

    register_captioner("colours", load)
    return seen


def pixels(generation):
    return np.stack([np.asarray(one.image) for one in generation.images])


def drawn(base, prompt="", **settings):
    return generate(GenerateRequest(prompt=prompt, seeds=(0, 1, 2), steps=2, **settings), base=base)


def test_none_is_the_empty_prompt_and_default_that_of_the_base(sd1_scheduled_base, tiny_base):
    assert sd1_scheduled_base.default_prompt == DEFAULT_PROMPT and tiny_base.default_prompt == ""
    given = {prompt: pixels(drawn(sd1_scheduled_base, prompt)) for prompt in ("", DEFAULT_PROMPT)}
    assert (given[""] != given[DEFAULT_PROMPT]).any()
    none, default = (drawn(sd1_scheduled_base, prompt_mode=mode) for mode in ("none", "default"))
    assert (pixels(none) == given[""]).all() and (pixels(default) == given[DEFAULT_PROMPT]).all()
    assert none.used["prompts"] == [""] * 3 and default.used["prompts"] == [DEFAULT_PROMPT] * 3
    assert "prompts" not in drawn(sd1_scheduled_base, "apple").used


def test_a_base_that_knows_few_words_has_no_default_prompt(tiny_base):
    assert load_base().default_prompt == "" and load_base().default_captioner == "concepts"
    with refused("unsupported", tiny_base.name, "automatic"):
        drawn(tiny_base, prompt_mode="default")


def test_automatic_draws_again_with_a_caption_of_each_first_image(sd1_scheduled_base, colours, tmp_path):
    steps = []
    request = GenerateRequest(prompt="", prompt_mode="automatic", captioner="colours", seeds=(0, 1, 2), steps=2)
    made = generate(request, base=sd1_scheduled_base, on_step=lambda step: steps.append((step.done, step.total)))
    first = drawn(sd1_scheduled_base, prompt_mode="default")
    (saw,) = colours
    assert (np.stack(saw) == pixels(first)).all()
    assert (np.stack([np.asarray(one.image) for one in made.first_images]) == pixels(first)).all()
    for number, (image, caption) in enumerate(zip(made.images, made.used["prompts"], strict=True)):
        alone = generate(GenerateRequest(prompt=caption, seeds=(number,), steps=2), base=sd1_scheduled_base)
        assert np.abs(np.asarray(alone.images[0].image, int) - np.asarray(image.image, int)).max() <= 1
        assert caption.endswith(" apple")
    assert steps == [(done, 4) for done in (1, 2, 3, 4)]
    made.save(tmp_path)
    assert np.asarray(Image.open(tmp_path / "first1.png")).tolist() == np.asarray(first.images[1].image).tolist()
    png = Image.open(tmp_path / "seed1.png").text
    assert png["prompt"] == made.used["prompts"][1]
    stored = json.loads(png["controlkit"])
    assert stored["used"]["prompts"] == [made.used["prompts"][1]] and stored["request"]["prompt"] == ""
    again = generate(read_settings(tmp_path / "seed1.png").to_request(), base=sd1_scheduled_base)
    assert np.abs(np.asarray(again.images[0].image, int) - np.asarray(made.images[1].image, int)).max() <= 1


def test_blip_from_a_folder_captions(sd1_scheduled_base, tiny_blip):
    made = drawn(sd1_scheduled_base, prompt_mode="automatic", captioner=tiny_blip)
    assert made.used["prompts"] == find_captioner(tiny_blip, sd1_scheduled_base)(
        [first.image for first in made.first_images]
    )
    with refused("missing-file", "nowhere/at/all", "--captioner"):
        drawn(sd1_scheduled_base, prompt_mode="automatic", captioner="nowhere/at/all")


def test_on_nano_the_nearest_concept_is_the_caption(tiny_base):
    """Shown true images, it names nearly all; each is an image of the gallery at another scale and position."""
    drawings = evaluation_set("seen-again").examples[:40]
    captions = find_captioner(None, tiny_base)([Image.fromarray(drawing.image) for drawing in drawings])
    right = [caption == drawing.concept.replace("-", " ") for caption, drawing in zip(captions, drawings, strict=True)]
    assert np.mean(right) > 0.8


@pytest.mark.parametrize(
    ("settings", "code", "facts"),
    [
        ({"prompt": "x", "prompt_mode": "none"}, "contradiction", ["none", "'x'"]),
        ({"prompt": "x", "prompt_mode": "automatic"}, "contradiction", ["automatic", "'x'"]),
        ({"prompt": "", "prompt_mode": "automatc"}, "unknown-name", ["'automatc'", "did you mean automatic"]),
        ({"prompt": "x", "captioner": "concepts"}, "contradiction", ["concepts", "given"]),
    ],
)
def test_contradictions_are_refused(settings, code, facts):
    with refused(code, *facts):
        GenerateRequest(**settings)


def test_on_the_command_line_a_prompt_or_a_mode_replaces_what_was_saved(base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main(["generate", "--base", str(base_folder), "--steps", "1", *words]) == 0
        capsys.readouterr()

    def request(folder):
        stored = json.loads((tmp_path / folder / "settings.json").read_text())["request"]
        return stored["prompt"], stored["prompt_mode"], stored["captioner"]

    run("--prompt-mode", "automatic", "--captioner", "concepts", "--out", "one")
    assert request("one") == ("", "automatic", "concepts")
    run("--from", "one", "--out", "two")
    assert request("two") == request("one")
    run("red apple", "--from", "one", "--out", "three")
    assert request("three") == ("red apple", "given", None)
    run("--prompt-mode", "none", "--from", "three", "--out", "four")
    assert request("four") == ("", "none", None)
    assert main(["generate", "red apple", "--prompt-mode", "none"]) == 2
    check(capsys.readouterr().err, "contradiction", "none", "'red apple'")
    assert main(["generate", "--prompt-mode", "given"]) == 2
    check(capsys.readouterr().err, "missing-setting", "prompt")
