"""A preview's score in training and `evaluate` are one number, in one mode, and each names its mode."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from controlkit.apps.cli import main
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.conditions import find
from controlkit.controls.ctrlora import BaseControlNet
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images
from controlkit.data.making import MakeSettings
from controlkit.data.pair import TARGET
from controlkit.data.pairs import read_pairs, write_pairs
from controlkit.evaluation.adapt import adapt
from controlkit.evaluation.eval_set import EvalSet, pairs_eval_set
from controlkit.evaluation.evaluate_control import evaluate_control
from controlkit.formats.load import load_control, save_control
from controlkit.nano.icon_source import IconSource
from controlkit.nano.icons import IconSets, draw
from controlkit.training.control_objective import ControlObjective
from controlkit.training.recipes import recipes
from controlkit.training.run import run
from refusals import refused
from tiny import randomise_zero_convolutions

CPU = torch.device("cpu")
WORDS = "mode control, weight 1, guidance 3, 10 ddim steps"


@pytest.fixture
def recipe(tmp_path, base_folder, icons_file):
    """A ControlNet from icons."""
    return recipes()["controlnet"](
        out=str(tmp_path / "run"),
        icons=str(icons_file),
        base=str(base_folder),
        condition="canny",
        steps=2,
        batch_size=2,
        variants=2,
        score_pictures=2,
        warmup_steps=0,
        log_every=1,
        preview_every=2,
        device="cpu",
    )


@pytest.fixture
def adapt_recipe(tmp_path, tiny_base, base_folder, icons_file):
    """An adapter from ten pairs, two of which are held out."""
    base_control = tmp_path / "base.safetensors"
    save_control(base_control, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
    drawings = [draw(icon, np.random.default_rng(0)).image for icon in IconSets(icons_file).icons[:10]]
    write_pairs(tmp_path / "pairs", [(find("palette")(image), image, "a shape") for image in drawings])
    return recipes()["ctrlora-adapter"](
        out=str(tmp_path / "run"),
        pairs=str(tmp_path / "pairs"),
        base=str(base_folder),
        control=str(base_control),
        name="mine",
        condition="palette",
        rank=2,
        steps=2,
        batch_size=2,
        held_out=0.2,
        log_every=1,
        preview_every=2,
        device="cpu",
    )


def acting(control):
    """The same control with weights that change images."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return control


def test_a_preview_of_pairs_scores_as_evaluate_does(adapt_recipe, tmp_path):
    objective = ControlObjective(adapt_recipe, CPU)
    acting(objective.control)
    objective.control.eval()
    (score,) = objective.preview(1, tmp_path).values()
    eval_set = pairs_eval_set(objective.source.of["palette"].held_out, objective.base.size)
    scores = {
        mode: evaluate_control(objective.base, objective.control, [eval_set], steps=10, mode=mode)[0]
        for mode in (None, "balanced")
    }
    assert score == pytest.approx(scores[None].facts[eval_set.name]["control"], abs=1e-6)
    assert score != pytest.approx(scores["balanced"].facts[eval_set.name]["control"], abs=1e-6)
    assert scores[None].settings["control"]["mode"] == objective.preview_settings["mode"] == "control"


def test_a_preview_of_larger_pairs_scores_as_evaluate_does(adapt_recipe, tmp_path):
    pairs = read_pairs(tmp_path / "pairs")
    (tmp_path / "images").mkdir()
    for index, pair in enumerate(pairs):
        Image.fromarray(pair.side(TARGET, 256)).save(tmp_path / "images" / f"{index}.png")
    make_pairs(list_images([tmp_path / "images"]), tmp_path / "large", MakeSettings(conditions=("canny",)), workers=1)
    recipe = dataclasses.replace(adapt_recipe, pairs=str(tmp_path / "large" / "canny"), condition="canny")
    objective = ControlObjective(recipe, CPU)
    acting(objective.control)
    objective.control.eval()
    (score,) = objective.preview(1, tmp_path).values()
    eval_set = pairs_eval_set(objective.source.of["canny"].held_out, objective.base.size)
    assert eval_set.references is not None
    report, _ = evaluate_control(objective.base, objective.control, [eval_set], steps=10)
    assert score == pytest.approx(report.facts[eval_set.name]["control"], abs=1e-6)


def test_a_preview_of_icons_scores_as_evaluate_does(recipe, tmp_path):
    objective = ControlObjective(recipe, CPU)
    randomise_zero_convolutions(objective.control)
    (score,) = objective.preview(1, tmp_path).values()
    held = objective.source.held_out("canny")
    eval_set = EvalSet(name="held", condition_images=held.condition_images, targets=held.targets, prompts=held.prompts)
    objective.control.eval()
    same, other = (
        evaluate_control(objective.base, objective.control, [eval_set], steps=10, mode=mode)[0].facts["held"]["control"]
        for mode in (None, "balanced")
    )
    assert score == pytest.approx(same, abs=1e-6)
    assert score != pytest.approx(other, abs=1e-6)


def test_every_place_that_has_a_score_names_its_mode(recipe, tmp_path, capsys):
    run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "preview" not in lines[0]
    assert lines[-1]["preview"] == {"mode": "control", "weight": 1.0, "guidance": 3.0, "steps": 10, "sampler": "ddim"}
    assert WORDS in (tmp_path / "run" / "canny.md").read_text()
    assert f"({WORDS})" in capsys.readouterr().err
    with Image.open(tmp_path / "run" / "previews" / "0000002.png") as image:
        told = json.loads(image.text["preview"])
    assert told["settings"]["mode"] == "control"
    assert told["scores"] == {"canny: edge F1": lines[-1]["canny: edge F1"]}


def test_the_verb_names_the_mode_of_its_scores(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"system": "controlnet", **dataclasses.asdict(recipe)}))
    assert main(["train", str(path)]) == 0
    assert f"({WORDS})" in capsys.readouterr().out
    assert main(["train", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preview"]["mode"] == "control"


def test_an_adapters_card_and_report_are_in_the_base_s_own_mode(adapt_recipe):
    made = adapt(adapt_recipe)
    own = load_base(adapt_recipe.base).default_mode
    assert made.report.settings["control"]["mode"] == own == "control"
    assert f"mode {own}, weight 1, guidance 3, 20 ddim steps" in made.path.with_suffix(".md").read_text()


def test_cards_of_others_and_edited_cards_stay(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    card = tmp_path / "run" / "canny.md"
    card.write_text("thesis")
    with refused("would-overwrite", card):
        run(recipe)
    card.unlink()
    run(recipe)
    assert WORDS in card.read_text()
    card.write_text("edited")
    run(recipe)
    assert card.read_text() == "edited"
    run(dataclasses.replace(recipe, steps=3))
    assert WORDS in card.read_text()


def test_a_card_is_written_anew_when_a_finished_run_has_weights_of_another_step(recipe, tmp_path, monkeypatch):
    scores = iter([0.5, 0.4, 0.4, 0.4])
    monkeypatch.setattr(IconSource, "scores", lambda *_: {"edge F1": next(scores)})
    patient = dataclasses.replace(recipe, preview_every=1, patience=5)
    run(patient)
    card = tmp_path / "run" / "canny.md"
    assert "after 1 steps" in card.read_text()
    run(dataclasses.replace(patient, patience=None))
    assert "after 2 steps" in card.read_text()
    card.write_text("edited")
    run(dataclasses.replace(patient, patience=None))
    assert card.read_text() == "edited"


def test_an_edited_card_of_an_adapter_stays(adapt_recipe):
    card = adapt(adapt_recipe).path.with_suffix(".md")
    card.write_text("edited")
    adapt(adapt_recipe)
    assert card.read_text() == "edited"


def test_the_mode_is_the_base_s(adapt_recipe, monkeypatch):
    monkeypatch.setattr(Base, "default_mode", "balanced")
    assert ControlObjective(adapt_recipe, CPU).preview_settings["mode"] == "balanced"


def test_a_control_that_acts_on_one_half_alone_is_in_that_mode(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Base, "default_mode", "balanced")
    run(recipe)
    control = load_control(tmp_path / "run" / "canny.safetensors", load_base(recipe.base))
    monkeypatch.setattr(type(control), "conditional_only", True)
    drawings = IconSets(recipe.icons).icons[:2]
    targets = [draw(icon, np.random.default_rng(0)).image for icon in drawings]
    eval_set = EvalSet(
        name="x", condition_images=[find("canny")(one) for one in targets], targets=targets, prompts=["a", "b"]
    )
    report, _ = evaluate_control(load_base(recipe.base), control, [eval_set], steps=1)
    assert report.settings["control"]["mode"] == "control"
