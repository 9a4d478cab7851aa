"""Scenes of two icons: where the icons are, how images are scored, and the evaluation of a control of boxes."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.apps.cli import main
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.controls.gligen import GLIGEN
from controlkit.formats.load import save_control
from controlkit.nano import evaluate_scenes as evaluation
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.icons import TRAINED_STYLES, Icon, IconSets
from controlkit.nano.scene_metrics import concept_accuracies, crop, drawn_pixels, found_boxes, mean_iou
from controlkit.nano.scenes import by_style, draw_scene, picture_of_boxes, pixels_of
from controlkit.training.recipes import build_recipe, read_recipe
from controlkit.training.run import objective_of, run_recipe
from refusals import check, refused


def icon(concept, rgb, style="noto", height=60):
    """A filled rectangle in the middle of a transparent square."""
    rgba = np.zeros((96, 96, 4), np.uint8)
    rgba[10 : 10 + height, 20:80] = (*rgb, 255)
    return Icon(concept=concept, style=style, rgba=rgba)


@pytest.fixture
def styles():
    red, blue = icon("red-apple", (255, 0, 0)), icon("blue-book", (0, 0, 255), height=30)
    return by_style([red, blue, icon("alone", (0, 0, 0), "fluent")])


@pytest.fixture
def scenes(styles):
    rng = np.random.default_rng(3)
    return [draw_scene(styles, rng) for _ in range(12)]


def test_boxes_are_those_of_the_visible_pixels_and_do_not_overlap(scenes):
    colours = {"red-apple": 0, "blue-book": 2}
    for scene in scenes:
        assert scene.style == "noto" and set(scene.concepts) == set(colours)
        covered = np.zeros((64, 64), int)
        for concept, box in zip(scene.concepts, scene.boxes, strict=True):
            left, top, right, bottom = pixels_of(box, 64)
            covered[top:bottom, left:right] += 1
            part, channel = scene.image[top:bottom, left:right].astype(int), colours[concept]
            others = [c for c in range(3) if c != channel]
            assert (part[..., channel] > 250).all() and (part[..., others] < 5).all()
            ratio = (right - left) / (bottom - top)
            assert ratio == pytest.approx(1.0 if channel == 0 else 2.0, rel=0.15)
        assert covered.max() == 1
        first, second = (concept.replace("-", " ") for concept in scene.concepts)
        assert scene.caption == f"{first} and {second}, noto style, on a {scene.colour} background"
        assert [entry["phrase"] for entry in scene.inputs["boxes"]] == [first, second]
        assert [entry["phrase"] for entry in scene.swapped["boxes"]] == [second, first]
        assert [entry["box"] for entry in scene.swapped["boxes"]] == [list(box) for box in scene.boxes]


def test_the_overlap_is_one_for_a_scene_and_less_the_farther_its_icons_are(scenes):
    apart = [scene for scene in scenes if scene.colour in ("white", "yellow", "black", "green")]
    images, boxes = [scene.image for scene in apart], [scene.boxes for scene in apart]
    assert apart and mean_iou(images, boxes) > 0.95
    for pixels in (2, 6):
        moved = [[tuple(side + pixels / 64 for side in box) for box in own] for own in boxes]
        assert mean_iou(images, moved) < 1 - pixels / 20
    empty = [np.full((64, 64, 3), 200, np.uint8)] * len(boxes)
    assert mean_iou(empty, boxes) == 0 and found_boxes(empty[0], boxes[0]) == [None, None]


def test_specks_are_not_drawn_pixels():
    image = np.full((64, 64, 3), 200, np.uint8)
    image[10, 10] = 0
    assert not drawn_pixels(image).any()
    image[30:40, 20:50] = 0
    assert drawn_pixels(image).sum() == 300


def test_a_crop_shows_a_box_with_a_margin_also_at_the_border():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :20] = 255
    shown = crop(image, (0.0, 0.0, 20 / 64, 1.0))
    assert shown.shape == (64, 64, 3) and (shown[:, :20] > 250).all()
    assert picture_of_boxes([(0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 1, 1)])[20, 20].tolist() == [96] * 3


def test_the_concept_of_a_box_is_told_by_its_crop():
    """Drawings of the evaluation set itself, two to an image."""
    pytest.importorskip("efficientnet_lite_pytorch")
    drawings = read_set("seen").examples[:8]
    images, concepts = [], []
    for first, second in zip(drawings[::2], drawings[1::2], strict=True):
        sides = [np.asarray(Image.fromarray(each.image).resize((128, 128))) for each in (first, second)]
        canvas = np.concatenate([np.concatenate(sides, 1), np.zeros((128, 256, 3), np.uint8)])
        images.append(canvas)
        concepts.append((first.concept, second.concept))
    boxes = [((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5))] * len(images)
    nearest, right = concept_accuracies(images, boxes, concepts)
    assert right >= 0.75 and nearest <= right
    assert concept_accuracies(images, boxes, [pair[::-1] for pair in concepts])[1] < right - 0.4


class TestTraining:
    @pytest.fixture
    def recipe(self, icons_file, base_folder, tmp_path):
        settings = {
            "system": "gligen",
            "scenes": str(icons_file),
            "base": str(base_folder),
            "steps": 2,
            "device": "cpu",
        }
        return build_recipe({**settings, "out": str(tmp_path / "run"), "batch_size": 4, "score_pictures": 2})

    def test_the_recipe_of_nano_is_one(self):
        recipe = read_recipe("recipes/nano/gligen.yaml")
        assert (recipe.condition, recipe.results, recipe.box_drop) == ("boxes", ("boxes.safetensors",), 0.1)

    def test_a_step_always_draws_the_same_and_drops_boxes_and_prompts(self, recipe):
        source = objective_of(recipe).source
        steps = [objective_of(recipe).sampling_step(0) for _ in range(2)]
        first, again = (source.batch("boxes", step) for step in steps)
        assert torch.equal(first.latents, again.latents)
        assert (first.inputs, first.text) == (again.inputs, again.text)
        assert len(source.samples("boxes", steps[0])) == 4
        for share, key, empty in ((1.0, "box_drop", True), (0.0, "box_drop", False)):
            batch = objective_of(dataclasses.replace(recipe, **{key: share})).source.batch("boxes", steps[0])
            assert all((sample["boxes"] == []) is empty for sample in batch.inputs)
        dropped = objective_of(dataclasses.replace(recipe, prompt_drop=1.0)).source.batch("boxes", steps[0])
        assert dropped.text == [""] * 4

    def test_held_out_concepts_are_not_drawn(self, recipe, icons_file):
        held_out = {one.concept for one in IconSets(icons_file).select(styles=TRAINED_STYLES, held_out=True)}
        source = objective_of(recipe).source
        assert held_out and not any(set(scene.concepts) & held_out for scene in source.held_out_scenes)

    def test_a_line_is_a_concept_and_those_that_are_not_drawn_are_noted(self, recipe, icons_file, tmp_path, capsys):
        known = sorted({icon.concept for icon in IconSets(icons_file).select(styles=TRAINED_STYLES, held_out=False)})
        path = tmp_path / "concepts.txt"
        path.write_text(f"{known[0].replace('-', ' ')} \n\n{known[1]}\nno such thing")
        source = objective_of(dataclasses.replace(recipe, concepts=str(path))).source
        assert {icon.concept for group in source.styles.values() for icon in group} == set(known[:2])
        said = capsys.readouterr().err
        assert f"note: 1 concepts in {path} are not trained on" in said and "no-such-thing" in said

    def test_patience_compares_the_fit_of_boxes(self, recipe, monkeypatch):
        fits = iter([0.5, 0.4])
        monkeypatch.setattr("controlkit.nano.scene_source.mean_iou", lambda images, boxes: next(fits))
        trained = run_recipe(dataclasses.replace(recipe, steps=3, preview_every=1, patience=1))
        assert trained.step == 1 and trained.scores == {"boxes: IoU": 0.5}

    def test_patience_of_a_control_of_condition_images_compares_their_fidelity(self, recipe, icons_file):
        settings = {"system": "controlnet", "scenes": str(icons_file), "out": recipe.out, "condition": "canny"}
        source = objective_of(build_recipe({**settings, "base": recipe.base, "steps": 1, "device": "cpu"})).source
        assert source.measure("canny").name == "edge F1" and source.measure("canny").higher_is_better

    def test_settings_out_of_range_and_icons_that_do_not_suffice_are_refused(self, recipe, tmp_path):
        with refused("out-of-range", "box_drop", "1.5"):
            dataclasses.replace(recipe, box_drop=1.5)
        (tmp_path / "none.txt").write_text("no-such-thing")
        with refused("empty-data", "two"):
            objective_of(dataclasses.replace(recipe, concepts=str(tmp_path / "none.txt")))

    def test_a_base_of_another_size_is_refused(self, recipe, monkeypatch):
        monkeypatch.setattr(StableDiffusion, "size", 128)
        with refused("contradiction", "64 x 64", "128 x 128", "base=nano"):
            objective_of(recipe)


class TestEvaluation:
    @pytest.fixture
    def path(self, tiny_base, tmp_path):
        control = GLIGEN.for_base(tiny_base, "boxes").eval().requires_grad_(False)
        return str(save_control(tmp_path / "boxes.safetensors", control, tiny_base))

    def test_it_compares_boxes_with_none_swapped_ones_and_the_scenes(
        self, path, scenes, base_folder, tmp_path, monkeypatch, capsys
    ):
        """A control that changes nothing closes none of the gap."""
        monkeypatch.setattr(evaluation, "evaluation_scenes", lambda icons, count: scenes[:count])
        monkeypatch.setattr(evaluation, "concept_accuracies", lambda images, boxes, concepts: (0.25, 0.5))
        # Through the autoencoder of the tiny base, whose weights are random, scenes may score no better than without
        # boxes: there would be no gap.
        monkeypatch.setattr(evaluation, "reconstruct", lambda base, images: list(images))
        sheet = tmp_path / "sheet.png"
        options = ["--base", str(base_folder), "--images", "2", "--steps", "2", "--sheet", str(sheet)]
        assert main(["evaluate", "scenes", path, *options, "--json"]) == 0
        (report,) = json.loads(capsys.readouterr().out)["reports"]
        baseline, swapped, boxes, ceiling, gap = report["rows"]
        assert baseline[1:] == swapped[1:] == boxes[1:] and gap[1] == 0 and ceiling[1] != baseline[1]
        assert boxes[2:] == [0.25, 0.5] and sheet.is_file()

    def test_its_scenes_have_concepts_of_the_evaluation_set(self, icons_file, monkeypatch):
        icons = IconSets(icons_file).select(styles=TRAINED_STYLES, held_out=False)
        few = [SimpleNamespace(concept=icon.concept) for icon in icons[:2]]
        monkeypatch.setattr(evaluation, "read_set", lambda name: SimpleNamespace(examples=few))
        made = evaluation.evaluation_scenes(icons_file, 5)
        assert [scene.boxes for scene in made] == [scene.boxes for scene in evaluation.evaluation_scenes(icons_file, 5)]
        assert {concept for scene in made for concept in scene.concepts} == {each.concept for each in few}

    @pytest.mark.parametrize(
        ("options", "code", "fact"),
        [
            (["control", "PATH"], "unsupported", "boxes (value)"),
            (["scenes", "canny", "--icons", "ICONS", "--base", "nano"], "unsupported", "boxes"),
            (["scenes", "PATH", "--pairs", "x"], "contradiction", "--pairs"),
            (["scenes", "PATH", "PATH"], "usage", "2"),
            (["scenes", "PATH", "--images", "0"], "out-of-range", "0"),
            (["scenes", "PATH", "--icons", "none.npz"], "missing-file", "none.npz"),
            (["control", "PATH", "--icons", "x"], "contradiction", "--icons"),
        ],
    )
    def test_other_controls_and_options_are_refused(
        self, options, code, fact, path, icons_file, base_folder, monkeypatch, capsys
    ):
        monkeypatch.setattr(evaluation, "evaluation_scenes", lambda icons, count: IconSets(icons).icons[:0])
        places = {"PATH": path, "ICONS": str(icons_file)}
        given = [places.get(option, option) for option in options]
        base = [] if "--base" in options else ["--base", str(base_folder)]
        assert main(["evaluate", *given, *base]) != 0
        check(capsys.readouterr().err, code, fact)
