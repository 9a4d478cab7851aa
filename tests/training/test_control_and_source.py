"""Any control trains from any source of data, and a source of one's own is one class."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.bases.load import load_base
from controlkit.bases.qwen_image import QwenImage
from controlkit.conditions import find
from controlkit.controls.ctrlora import BaseControlNet
from controlkit.controls.inputs import takes_one_image
from controlkit.errors import UserError
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.images import to_tensor
from controlkit.training.recipe import ControlRecipe
from controlkit.training.recipes import build_recipe, by_source, recipes
from controlkit.training.run import objective_of, run
from controlkit.training.run_folder import fingerprint
from controlkit.training.sources import registry
from controlkit.training.sources.source import Batch, HeldOut, Source, Step
from refusals import refused
from tiny import OF_TRANSFORMERS, saved_pipeline, tiny_of_known

OWN = {"controlnet-xs": {"size_ratio": 0.5}, "ctrlora-base": {"rank": 2}, "ctrlora-adapter": {"rank": 2}}
CONTROLS = {system: kind for system, kind in recipes().items() if issubclass(kind, ControlRecipe)}
EVERY = [system for system, kind in CONTROLS.items() if kind.training.system == system]
SYSTEMS = [
    system for system in EVERY if takes_one_image(CONTROLS[system].control_class) or CONTROLS[system].training.together
]
SOURCES = list(registry.sources())


def image(number: int) -> np.ndarray:
    blocks = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((64, 64)))


@pytest.fixture
def data(tmp_path, icons_file):
    """Every source with the conditions canny and grayscale."""
    names = ("canny", "grayscale")
    pairs, multigen = tmp_path / "pairs", tmp_path / "multigen"
    (multigen / "json_files").mkdir(parents=True)
    for folder in (pairs / "images", multigen / "images"):
        folder.mkdir(parents=True)
        for number in range(5):
            Image.fromarray(image(number)).save(folder / f"{number}.png")
    for name in names:
        for folder in (pairs / name, multigen / "conditions" / name):
            folder.mkdir(parents=True)
            for number in range(5):
                Image.fromarray(find(name)(image(number))).save(folder / f"{number}.png")
        lines = [{"source": f"{n}.png", "prompt": "thing", f"control_{name}": f"{name}/{n}.png"} for n in range(5)]
        path = multigen / f"json_files/aesthetics_plus_all_group_{name}_all.json"
        path.write_text("\n".join(map(json.dumps, lines)))
    lines = [
        {"file_name": f"images/{n}.png", "text": "thing", **{name: f"{name}/{n}.png" for name in names}}
        for n in range(5)
    ]
    (pairs / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folders = {"multigen": str(tmp_path / "multigen"), "pairs": str(tmp_path / "pairs")}
    return {"icons": str(icons_file), "scenes": str(icons_file), **folders}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """System for a transformer -> folder of a tiny base."""
    return {
        system: saved_pipeline(tiny_of_known(name), tmp_path_factory.mktemp(system))
        for system, name in OF_TRANSFORMERS.items()
    }


@pytest.fixture
def settings(tmp_path, base_folder, transformers, tiny_base, monkeypatch):
    monkeypatch.setattr(QwenImage, "usual_size", 64)  # that of the icons; none of its configurations has one

    def of(system):
        own = dict(OWN.get(system, {}))
        if system == "ctrlora-adapter":
            path = tmp_path / "run" / "shared.safetensors"
            path.parent.mkdir()
            save_control(path, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
            own["control"] = str(path)
        several = recipes()[system].training.several
        own |= {"conditions": ["canny", "grayscale"]} if several else {"condition": "canny", "name": "mine"}
        common = {"batch_size": 2, "score_pictures": 2, "steps": 2, "log_every": 1, "preview_every": 2}
        return {
            "system": system,
            "out": str(tmp_path / "run"),
            "base": str(transformers.get(system, base_folder)),
            "device": "cpu",
            **common,
        } | own

    return of


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_control_trains_from_every_source(system, source, settings, data, tmp_path):
    recipe = build_recipe({**settings(system), source: data[source]})
    assert isinstance(recipe, recipes()[system]) and type(recipe) is by_source(recipes()[system])[source]
    scores = run(recipe)
    assert {name.partition(": ")[0] for name in scores} == set(recipe.condition_names)
    assert all(np.isfinite(score) for score in scores.values())
    with Image.open(tmp_path / "run/previews/0000002.png") as preview:
        assert json.loads(preview.text["preview"])["scores"] == scores
        # Condition images and results of each condition, and the targets, which icons share and other sources do not.
        count = len(recipe.condition_names)
        assert preview.height >= 96 * (2 * count + (1 if source == "icons" else count))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    base = load_base(recipe.base)
    for name in recipe.results:
        made = json.loads(read_metadata(tmp_path / "run" / name)["control.made"])
        assert made["steps"] == 2 and made.get("pairs") == ({"pairs": 4 * count}.get(source))
        assert ("held_out" in made) == (source == "pairs")
        assert load_control(tmp_path / "run" / name, base).kind.partition("-")[0] == system.partition("-")[0]


def test_controls_of_values_train_from_sources_that_have_them_and_no_other(settings, data, tmp_path, tiny_base):
    systems = [system for system in EVERY if system not in SYSTEMS]
    assert systems
    for system in systems:
        values = settings(system)
        for source, kind in registry.sources().items():
            recipe = build_recipe({**values, source: data[source], **({"condition": "boxes"} if kind.values else {})})
            if not kind.values:
                with refused("unsupported", "boxes (value)", source):
                    objective_of(recipe)
                continue
            scores = run(recipe)
            assert set(scores) == {"boxes: IoU"} and 0 <= scores["boxes: IoU"] <= 1
            with Image.open(tmp_path / "run/previews/0000002.png") as preview:
                assert json.loads(preview.text["preview"])["scores"] == scores
            assert load_control(tmp_path / "run/mine.safetensors", tiny_base).condition == "boxes"
            with refused("contradiction", "'canny'", "boxes"):
                objective_of(build_recipe({**values, "out": str(tmp_path / "other"), source: data[source]}))


def test_a_base_control_learns_several_conditions_from_pairs_in_turn(settings, data):
    objective = objective_of(build_recipe({**settings("ctrlora-base"), "pairs": data["pairs"]}))
    seen = [objective.samples(step) for step in range(2)]
    assert sorted({text.partition(": ")[0] for step in seen for text in step}) == ["canny", "grayscale"]
    for step in seen:
        name = step[0].partition(": ")[0]
        assert all(f"pairs/{name}/" in text for text in step)
    only = build_recipe({**settings("ctrlora-base"), "pairs": data["pairs"], "conditions": ["canny"]})
    assert objective_of(only).data != objective.data != ""


def test_recipes_that_were_kept_with_a_source_that_is_null_are_read(settings):
    values = {**settings("controlnet"), "icons": "icons.npz"}
    assert build_recipe({**values, "multigen": None}) == build_recipe(values)
    with refused("unknown-key", "'icon'", "did you mean icons"):
        build_recipe({**settings("controlnet"), "icon": "icons.npz"})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"system": "controlnet", "icons": "i", "condition": "canny", "steps": 5}, "05d62d5e"),
        ({"system": "controlnet-xs", "multigen": "m", "condition": "hed", "steps": 5}, "9d64d2b9"),
        ({"system": "ctrlora-base", "icons": "i", "conditions": ["canny", "hed"], "steps": 5}, "4585e70f"),
        ({"system": "controlnet-pairs", "pairs": "p"}, "cc0f62a6"),
        # Since then T2I-Adapters draw noisy times more often, unless the recipe says otherwise.
        ({"system": "t2i-adapter-pairs", "pairs": "p", "flip": True, "time_sampling": None}, "b2545eab"),
        ({"system": "ctrlora-adapter", "pairs": "p", "control": "c"}, "8ca56b6b"),
        ({"system": "ctrlora-full", "pairs": "p"}, "4bc912ab"),
    ],
    ids=lambda value: value["system"] if isinstance(value, dict) else "",
)
def test_runs_of_the_time_before_sources_were_chosen_go_on(values, expected):
    """All defaults count in a fingerprint; these are the first digits of those that such runs have recorded."""
    assert fingerprint(build_recipe({**values, "out": "x"})).startswith(expected)


class TestASourceOfOnesOwn:
    """Grey images of a random brightness, under their own name in recipes; no code of training knows it."""

    @pytest.fixture
    def shades(self, monkeypatch):
        known = registry.sources()
        monkeypatch.setattr(registry, "_REGISTRY", dict(known))

        @dataclass(frozen=True, kw_only=True)
        class ShadeSettings(ControlRecipe):
            shades: int
            """How many there are."""
            learning_rate: float = 0.02
            """Peak learning rate of AdamW."""

        @registry.source
        class Shades(Source):
            name = "shades"
            Settings = ShadeSettings

            def __init__(self, recipe):
                if recipe.shades < 2:
                    raise UserError("shades must be 2 at least", "out-of-range")
                self.count = recipe.shades

            def notes(self, base):
                return [f"{self.count} shades of {base.size} pixels"]

            def prepare(self, base, control):
                self.base = base

            def image(self, shade):
                return np.full((self.base.size, self.base.size, 3), 255 * shade // self.count, np.uint8)

            def batch(self, condition, step: Step):
                chosen = step.rng().integers(self.count, size=step.global_batch)[step.local_slice]
                images = to_tensor([self.image(shade) for shade in chosen])
                latents = self.base.encode_image(images * 2 - 1)
                return Batch(latents=latents, text=["grey"] * len(images), condition_images=images)

            def samples(self, condition, step: Step):
                return [f"shade {shade}" for shade in step.rng().integers(self.count, size=step.global_batch)]

            def held_out(self, condition):
                images = [self.image(shade) for shade in (0, self.count - 1)]
                return HeldOut(condition_images=images, targets=images, prompts=["grey"] * 2)

            def scored_by(self, condition):
                return find("grayscale")

            @property
            def digest(self):
                return str(self.count)

            def facts(self):
                return {"shades": self.count}

        return Shades

    @pytest.mark.parametrize("system", ["controlnet", "ctrlora-adapter", "ctrlora-base"])
    def test_it_trains_a_control_and_resumes(self, system, shades, settings, tmp_path, capsys):
        recipe = build_recipe({**settings(system), "shades": 8, "warmup_steps": 0, "min_lr_rate": 1.0})
        # Defaults of a source count, unless the system has its own.
        assert recipe.source is shades and recipe.learning_rate == (1e-3 if system == "ctrlora-adapter" else 0.02)
        assert ": shade " in objective_of(recipe).samples(0)[0]
        scores = run(recipe)
        assert "note: 8 shades of 64 pixels" in capsys.readouterr().err
        assert len(scores) == len(recipe.condition_names)
        parts = dataclasses.replace(recipe, out=str(tmp_path / "parts"))
        run(dataclasses.replace(parts, steps=1))
        assert run(parts) == scores
        for name in recipe.results:
            assert json.loads(read_metadata(tmp_path / "run" / name)["control.made"])["shades"] == 8
        capsys.readouterr()
        run(dataclasses.replace(recipe, steps=3))
        assert "the data has changed" not in capsys.readouterr().err

    def test_its_settings_are_listed_and_checked_with_the_others(self, shades, settings):
        assert list(by_source(recipes()["controlnet"])) == sorted([*SOURCES, "shades"])
        with refused("missing-setting", "icons, multigen, pairs, scenes or shades"):
            build_recipe(settings("controlnet"))
        with pytest.raises(UserError, match="shades must be 2 at least"):
            objective_of(build_recipe({**settings("controlnet"), "shades": 1}))
        with pytest.raises(ValueError, match=r"the name 'shades' is taken by .*Shades"):

            @registry.source
            class Other(shades):
                pass

    def test_without_it_its_name_is_no_setting(self, settings):
        with refused("unknown-key", "'shades'"):
            build_recipe({**settings("controlnet"), "shades": 3})

    def test_packages_name_theirs_by_entry_points(self, shades, settings, monkeypatch, tmp_path):
        (tmp_path / "my_package-1.0.dist-info").mkdir()
        (tmp_path / "my_package-1.0.dist-info/METADATA").write_text("Name: my-package\nVersion: 1.0\n")
        points = tmp_path / "my_package-1.0.dist-info/entry_points.txt"
        points.write_text("[controlkit.sources]\nfolder = my_source\n")
        (tmp_path / "my_source.py").write_text(
            "from controlkit.training.sources import pairs, registry\n"
            "@registry.source\n"
            "class Folder(pairs.PairSource):\n"
            "    name = 'folder'\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        registry._load.cache_clear()
        assert registry.sources()["folder"].__module__ == "my_source"
        points.write_text("[controlkit.sources]\nfolder = nothing_of_this_name\n")
        registry._load.cache_clear()
        with pytest.raises(UserError, match="nothing_of_this_name of the entry point folder cannot be loaded"):
            registry.sources()
        points.unlink()
        registry._load.cache_clear()
