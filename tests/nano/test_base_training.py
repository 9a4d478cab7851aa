"""Training an embedded base's text encoder and UNet on icons."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from controlkit.bases.load import load_base
from controlkit.nano.base_objective import BaseObjective
from controlkit.nano.icons import STYLES, IconSets, read_concepts
from controlkit.nano.recipes import BaseRecipe
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run
from refusals import refused

CPU = torch.device("cpu")


@pytest.fixture
def recipe(base_folder, icons_file, tmp_path):
    return BaseRecipe(
        out=str(tmp_path / "run"),
        steps=2,
        batch_size=2,
        variants=2,
        icons=str(icons_file),
        start=str(base_folder),
        device="cpu",
        log_every=1,
        save_every=100,
        preview_every=100,
    )


def with_settings(recipe, **settings):
    return BaseRecipe(**{**vars(recipe), **settings})


def test_training_goes_on_from_a_base_and_leaves_one(recipe, tiny_base, tmp_path):
    run(recipe)
    made = load_base(tmp_path / "run" / "base")
    assert made.fingerprint != tiny_base.fingerprint
    assert made.scheduler_config["prediction_type"] == "v_prediction"


def test_settings_that_a_start_overrides_are_told(recipe, capsys):
    BaseObjective(recipe, CPU)
    assert "not used" not in capsys.readouterr().err
    BaseObjective(with_settings(recipe, text_layers=3, channels=(8, 16, 16)), CPU)
    assert f"channels, text_layers of the recipe are not used: those of {recipe.start} are" in capsys.readouterr().err


def test_only_the_concepts_of_the_file_are_trained_on(recipe, tmp_path, capsys):
    everything = {icon.concept for icon in BaseObjective(recipe, CPU).drawings.icons}
    chosen = sorted(everything)[:2]
    path = tmp_path / "concepts.txt"
    path.write_text("\n".join((*chosen, "never-drawn")) + "\n")
    objective = BaseObjective(with_settings(recipe, concepts=str(path)), CPU)
    assert {icon.concept for icon in objective.drawings.icons} == set(chosen)
    note = capsys.readouterr().err
    assert f"1 concepts in {path} are not trained on" in note and note.count("never-drawn") == 1
    objective.loss(0)
    for text in ("never-drawn", " \n"):
        path.write_text(text)
        with refused("empty-data", path):
            BaseObjective(with_settings(recipe, concepts=str(path)), CPU)
    with refused("missing-file", tmp_path / "nowhere.txt"):
        read_concepts(tmp_path / "nowhere.txt")


def test_the_smallest_icon_is_as_large_as_is_said(recipe):
    def largest_border(objective):
        sizes = []
        for index in range(len(objective.drawings)):
            image = objective.drawings.draw(index).image.astype(int)
            rows, columns = np.nonzero(np.abs(image - image[:1, :1]).max(axis=2) > 25)
            sizes.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        return min(sizes)

    small, large = (BaseObjective(with_settings(recipe, least_scale=s, variants=8), CPU) for s in (0.3, 0.9))
    assert largest_border(small) < 30 < 42 < largest_border(large)
    assert not torch.equal(small.drawings.latents, large.drawings.latents)
    with refused("out-of-range", "least_scale is 0", 0.1):
        with_settings(recipe, least_scale=0)


def test_selection_by_name(icons_file):
    sets = IconSets(icons_file)
    styles = ("noto", "twemoji")
    one = sets.icons[0].concept
    assert {icon.concept for icon in sets.select(styles=styles, concepts={one})} == {one}
    assert sets.select(styles=styles, concepts=()) == []


def test_memory_that_is_short_in_a_preview_leaves_what_trains_as_it_is(recipe, tmp_path, monkeypatch):
    objective = BaseObjective(recipe, CPU)
    trained = [parameter for parameter in objective.trained.parameters() if parameter.requires_grad]

    def full(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr("controlkit.nano.base_objective.sample_prompts", full)
    with pytest.raises(MemoryError):
        objective.preview(1, tmp_path)
    assert trained and [*map(id, objective.parameters())] == [*map(id, trained)]
    assert all(network.training for network in objective.trained.values())


def test_another_run_on_the_same_drawings_does_not_encode_them_again(recipe, tmp_path, capsys):
    first = BaseObjective(recipe, CPU).drawings
    assert "encoding" in capsys.readouterr().err
    other = BaseObjective(with_settings(recipe, out=str(tmp_path / "other"), steps=2), CPU).drawings
    assert "encoding" not in capsys.readouterr().err
    assert torch.equal(other.latents, first.latents) and other.colours == first.colours
    assert first.colours == [first.draw(index).colour for index in range(len(first))]


def test_icons_that_changed_are_drawn_and_encoded_again(recipe, icons_file, tmp_path):
    recipe = with_settings(recipe, icons=str(tmp_path / "icons.npz"))
    shutil.copyfile(icons_file, recipe.icons)
    before = BaseObjective(recipe, CPU).drawings.latents
    assert torch.equal(BaseObjective(recipe, CPU).drawings.latents, before)
    with np.load(icons_file) as archive:
        arrays = dict(archive)
    for style in STYLES:
        arrays[style] = arrays[style].copy()
        arrays[style][..., :3] = 255 - arrays[style][..., :3]
    np.savez_compressed(recipe.icons, **arrays)
    assert not torch.equal(BaseObjective(recipe, CPU).drawings.latents, before)


def test_a_base_has_attention_for_each_of_its_channels():
    with refused("contradiction", "attention has 2 entries", "channels 3"):
        build_recipe(
            {"system": "base", "out": "x", "steps": 1, "icons": "y", "start": "nano", "attention": [False, True]}
        )
