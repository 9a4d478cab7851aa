"""Evaluation sets of other packages: found by name, and used like those that ship."""

from __future__ import annotations

import json

import numpy as np
import pytest

from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.errors import UserError
from controlkit.evaluation import sets
from controlkit.evaluation.evaluate_control import evaluate_controls
from controlkit.evaluation.sets import EvaluationSet, Example, evaluation_set, evaluation_sets, register_evaluation_set
from controlkit.formats.load import load_control, save_control
from refusals import refused


@pytest.fixture
def fresh_registry(monkeypatch):
    """The sets of other tests stay apart from each other's."""
    evaluation_sets()
    monkeypatch.setattr(sets, "_REGISTRY", dict(sets._REGISTRY))
    yield
    sets._load.cache_clear()


def photos(count=3, name="photos"):
    """Wide images, unlike the square ones that ship."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (72, 96, 3), dtype=np.uint8) for _ in range(count)]
    return EvaluationSet(name, tuple(Example(image=image, caption=f"photo {i}") for i, image in enumerate(images)))


def test_a_set_that_was_registered_is_found(fresh_registry):
    register_evaluation_set("photos", "three photographs", photos)
    assert evaluation_sets()["photos"] == "three photographs"
    found = evaluation_set("photos")
    assert found.captions == ["photo 0", "photo 1", "photo 2"]
    assert [image.shape for image in found.first(2).images] == [(72, 96, 3)] * 2
    with refused("unknown-name", "'photo'", "did you mean photos"):
        evaluation_set("photo")
    with pytest.raises(ValueError, match="'photos' is registered already"):
        register_evaluation_set("photos", "others", photos)


def test_a_control_is_judged_on_it(fresh_registry, tiny_base, tiny_control, base_folder, tmp_path, capsys):
    register_evaluation_set("photos", "three photographs", photos)
    file = save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    words = ["evaluate", "control", str(file), "--base", str(base_folder), "--sets", "photos", "--steps", "1"]
    assert main([*words, "--pictures", "2", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert [row[0] for row in report["rows"]] == ["photos (2)"]
    assert main([*words, "--images", "4", "--json"]) == 0
    told = capsys.readouterr()
    assert [row[0] for row in json.loads(told.out)["reports"][0]["rows"]] == ["photos (3)"]
    assert "photos has 3 images, fewer than 4" in told.err
    base = load_base(base_folder)
    several, _ = evaluate_controls(base, {"one": load_control(file, base)}, [photos(2)], steps=1)
    # Not the gap closed, which may be NaN here and is null in JSON.
    assert [*several.rows[0][2:5]] == report["rows"][0][1:4]


def write_package(folder, module, code):
    (folder / "my_package-1.0.dist-info").mkdir()
    (folder / "my_package-1.0.dist-info" / "METADATA").write_text("Name: my-package\nVersion: 1.0\n")
    points = f"[{sets.ENTRY_POINTS}]\nphotos = {module}\n"
    (folder / "my_package-1.0.dist-info" / "entry_points.txt").write_text(points)
    (folder / f"{module}.py").write_text(code)


def test_an_entry_point_registers_sets(fresh_registry, monkeypatch, tmp_path):
    write_package(
        tmp_path,
        "my_package_sets",
        "from controlkit.evaluation.sets import EvaluationSet, register_evaluation_set\n"
        "register_evaluation_set('empty', 'no photographs', lambda: EvaluationSet('empty', ()))\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    sets._load.cache_clear()
    assert evaluation_set("empty").images == []


def test_an_entry_point_that_fails_is_named(fresh_registry, monkeypatch, tmp_path):
    write_package(tmp_path, "my_broken_sets", "1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    sets._load.cache_clear()
    with pytest.raises(UserError, match="my_broken_sets of the entry point photos cannot be loaded: ZeroDiv"):
        evaluation_sets()
