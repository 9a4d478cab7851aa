"""`generate --from`: the same images, or a word on what has changed behind a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.conditions import find
from controlkit.formats.load import find_control, shipped_controls
from controlkit.images import write_png
from controlkit.sampling import identity
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import SavedSettings, read_settings
from controlkit.sampling.uses import ControlUse, LoraUse
from refusals import check, refused

DRAWING = np.full((80, 64, 3), 200, np.uint8)
DRAWING[20:60, 14:46] = (180, 30, 30)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def pixels(path):
    return np.asarray(Image.open(path)).tolist()


@pytest.fixture
def drawn(tmp_path, monkeypatch, capsys):
    """The folder of an image, drawn in a folder beside it from `drawing.png` there."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    write_png(home / "drawing.png", Image.fromarray(DRAWING))
    assert run("generate", "red apple", "--control", "canny=drawing.png@0.8", "--steps", 1, "--out", "../first") == 0
    capsys.readouterr()
    return tmp_path / "first"


def notes_of(capsys, *words):
    assert run("generate", "--out", "out", *words) == 0
    return [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def test_settings_hold_hashes_and_a_folder_is_taken_for_the_settings_in_it(drawn, capsys):
    settings = json.loads((drawn / "settings.json").read_text())
    assert json.loads(Image.open(drawn / "seed0.png").text["controlkit"]) == settings
    (one,) = settings["sha256"]["controls"]
    assert one["control"] == identity.file_sha256(find_control("canny")) and one["companion"] is None
    assert all(len(one[name]) == 64 for name in ("image", "control", "condition"))
    assert len(settings["sha256"]["base"]) == 64
    assert not [note for note in notes_of(capsys, "--from", drawn) if "crop" not in note]
    assert pixels("out/seed0.png") == pixels(drawn / "seed0.png")
    assert json.loads((drawn.parent / "home/out/settings.json").read_text())["sha256"] == settings["sha256"]
    (drawn / "settings.json").unlink()
    assert run("generate", "--from", drawn) == 2
    check(capsys.readouterr().err, "missing-file", drawn / "settings.json")


@pytest.mark.parametrize(("change", "file"), [("removed", "settings.json"), ("changed", "seed0.png")])
def test_the_saved_condition_image_takes_the_place_of_an_image_that_is_gone_or_changed(drawn, change, file, capsys):
    path = drawn.parent / "home" / "drawing.png"
    path.unlink() if change == "removed" else write_png(path, Image.new("RGB", (64, 64), "red"))
    (note,) = notes_of(capsys, "--from", drawn / file)
    assert note.startswith("drawing.png ") and str(drawn / "condition0.png") in note
    assert ("SHA-256" in note) == (change == "changed")
    assert pixels("out/seed0.png") == pixels(drawn / "seed0.png")
    # From there on it is drawn without a word: the condition image is what is given.
    again = json.loads((drawn.parent / "home/out/settings.json").read_text())["request"]["controls"][0]
    assert again["prepared"] and again["image"] == str(drawn / "condition0.png")
    write_png(drawn / "condition0.png", Image.new("RGB", (64, 64), "red"))
    assert run("generate", "--from", drawn / file, "--out", "other") == 2
    facts = ("drawing.png", drawn / "condition0.png", "--control canny=IMAGE")
    said = capsys.readouterr().err
    check(said, "missing-file", *facts)
    assert said.count("SHA-256") == (1 if change == "removed" else 2)
    (drawn / "condition0.png").unlink()
    assert run("generate", "--from", drawn / file, "--out", "other") == 2
    said = capsys.readouterr().err
    check(said, "missing-file", *facts)
    assert said.count("SHA-256") == (0 if change == "removed" else 1)
    assert run("generate", "--from", drawn / file, "--control", f"canny={drawn / 'seed0.png'}", "--out", "other") == 0


def test_paths_are_tried_from_the_folder_of_the_settings(drawn, tmp_path, monkeypatch, capsys):
    shutil.copy("drawing.png", drawn / "drawing.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_settings(drawn).to_request().controls[0].image == str(drawn / "drawing.png")
    # Another image of the same name in the way does not count.
    write_png("drawing.png", Image.new("RGB", (64, 64), "red"))
    assert read_settings(drawn).to_request().controls[0].image == str(drawn / "drawing.png")
    assert not [note for note in notes_of(capsys, "--from", drawn) if "crop" not in note]
    assert pixels("out/seed0.png") == pixels(drawn / "seed0.png")
    # Controls and bases are found there, too.
    settings = json.loads((drawn / "settings.json").read_text())
    settings["request"]["controls"][0]["control"], settings["request"]["base"] = "mine.safetensors", "model"
    (drawn / "settings.json").write_text(json.dumps(settings))
    (drawn / "model").mkdir()
    shutil.copy(find_control("canny"), drawn / "mine.safetensors")
    again = read_settings(drawn).to_request()
    assert (again.controls[0].control, again.base) == (str(drawn / "mine.safetensors"), str(drawn / "model"))
    shutil.copy(find_control("canny"), drawn / "base.safetensors")
    settings["request"]["controls"][0]["control"] = "mine.safetensors+base.safetensors"
    (drawn / "settings.json").write_text(json.dumps(settings))
    both = f"{drawn / 'mine.safetensors'}+{drawn / 'base.safetensors'}"
    assert read_settings(drawn).to_request().controls[0].control == both


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("control", "control canny has changed since (SHA-256)"),
        ("base", "base nano has changed since (SHA-256)"),
        ("condition", "the condition image of canny from drawing.png differs from the saved one"),
    ],
)
def test_a_control_a_base_or_a_condition_that_has_changed_is_named(drawn, part, says, capsys):
    settings = json.loads((drawn / "settings.json").read_text())
    hashes = settings["sha256"]
    (hashes if part == "base" else hashes["controls"][0])[part] = "0" * 64
    (drawn / "settings.json").write_text(json.dumps(settings))
    told = [note for note in notes_of(capsys, "--from", drawn) if "crop" not in note]
    assert len(told) == 1 and told[0].startswith(says)
    # What is replaced on purpose has not changed.
    others = {"base": [], "control": ["--control", "nano/canny=drawing.png"], "condition": ["--width", "80"]}[part]
    if others:
        notes = notes_of(capsys, "--from", drawn, *others)
        assert not [note for note in notes if "since" in note or "differs from the saved" in note]


def test_the_base_control_that_an_adapter_finds_is_part_of_it(drawn, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    adapter = tmp_path / "mine" / "palette.safetensors"
    shutil.copy(shipped_controls()["nano/palette"], adapter)
    words = ("--control", f"{adapter}=drawing.png", "--steps", 1)
    assert run("generate", "apple", *words, "--out", tmp_path / "second") == 0
    path = tmp_path / "second" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings["sha256"]["controls"][0]["companion"]
    settings["sha256"]["controls"][0]["companion"] = "another"
    path.write_text(json.dumps(settings))
    capsys.readouterr()
    (note,) = (note for note in notes_of(capsys, "--from", path) if "crop" not in note)
    assert "base control" in note and str(adapter) in note and "SHA-256" in note


def test_settings_of_earlier_versions_have_no_hashes(drawn, capsys):
    settings = json.loads((drawn / "settings.json").read_text())
    del settings["sha256"]
    (drawn / "settings.json").write_text(json.dumps(settings))
    assert not [note for note in notes_of(capsys, "--from", drawn) if "crop" not in note]
    assert pixels("out/seed0.png") == pixels(drawn / "seed0.png")
    (drawn.parent / "home" / "drawing.png").unlink()
    (note,) = notes_of(capsys, "--from", drawn)
    assert note.startswith("drawing.png is missing") and "condition0.png" in note
    assert pixels("out/seed0.png") == pixels(drawn / "seed0.png")
    for odd in ([], {"controls": 3}, {"controls": [None]}):
        (drawn / "settings.json").write_text(json.dumps({**settings, "sha256": odd}))
        assert read_settings(drawn).to_request().controls[0].prepared


def test_hashes_of_large_files_are_kept_until_the_file_changes(tmp_path, monkeypatch, cache):
    path = tmp_path / "large.bin"
    path.write_bytes(b"one")
    one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert identity.file_sha256(path) == one and not (cache / "sha256").exists()
    monkeypatch.setattr(identity, "_LARGE", 1)
    monkeypatch.setattr(identity, "_SETTLED", -1e9)
    assert identity.file_sha256(path) == one
    (record,) = (cache / "sha256").iterdir()
    record.write_text(record.read_text().replace(one, "kept"))
    assert identity.file_sha256(path) == "kept"
    path.write_bytes(b"other")
    assert identity.file_sha256(path) not in ("kept", one)
    record.write_text("{")
    path.write_bytes(b"one")
    assert identity.file_sha256(path) == one
    # A file that changed just now may change again within the clock's tick.
    monkeypatch.setattr(identity, "_SETTLED", 1e9)
    record.unlink()
    assert identity.file_sha256(path) == one and not record.exists()
    with refused("unreadable-file", tmp_path / "none"):
        identity.file_sha256(tmp_path / "none")


def test_the_hub_s_own_hash_is_taken(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert identity.file_sha256(tmp_path / "model.safetensors") == "ab" * 32


def test_the_hub_is_not_asked_again_for_what_was_loaded(base_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or str(base_folder)
    )
    assert identity.base_sha256("someone/model") == identity.base_sha256(str(base_folder))
    assert [options.get("local_files_only") for options in asked] == [True]


def test_every_weight_and_setting_of_a_folder_counts(base_folder):
    before = identity.base_sha256(str(base_folder))
    (base_folder / "README.md").write_text("not read")
    (base_folder / "unet" / "model.fp16.safetensors").write_bytes(b"not read either")
    assert identity.base_sha256(str(base_folder)) == before
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        (base_folder / name).write_text((base_folder / name).read_text() + " ")
        now = identity.base_sha256(str(base_folder))
        assert now != before
        before = now


def test_weights_in_half_precision_and_in_torch_files_count(base_folder):
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"):
        part = base_folder / name
        (part.parent / "diffusion_pytorch_model.safetensors").rename(part)
        before = identity.base_sha256(str(base_folder))
        part.write_bytes(part.read_bytes() + b" ")
        assert identity.base_sha256(str(base_folder)) != before


def test_a_condition_image_s_hash_is_of_its_pixels():
    edges = Image.fromarray(find("canny")(DRAWING))
    assert identity.pixels_sha256(edges) == identity.pixels_sha256(edges.copy())
    assert identity.pixels_sha256(edges) != identity.pixels_sha256(edges.transpose(Image.Transpose.TRANSPOSE))


def test_a_mask_and_parameters_are_restored_and_the_saved_mask_replaces_one_that_has_changed(drawn, capsys):
    home = drawn.parent / "home"
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    write_png(home / "mask.png", Image.fromarray(half))
    layers = sum(site.startswith("skip.") for site in load_base().sites) + 1
    control = f"canny=drawing.png@0.8,mask=mask.png,low=40,layers={':'.join(['0.5'] * layers)}"
    assert run("generate", "red apple", "--control", control, "--steps", 1, "--out", "../masked") == 0
    capsys.readouterr()
    masked = drawn.parent / "masked"
    assert pixels(masked / "mask0.png") == half.tolist() and pixels(masked / "seed0.png") != pixels(drawn / "seed0.png")
    settings = json.loads((masked / "settings.json").read_text())
    (use,) = settings["request"]["controls"]
    assert (use["mask"], use["parameters"], use["layers"]) == ("mask.png", {"low": 40}, [0.5] * layers)
    assert not [note for note in notes_of(capsys, "--from", masked) if "crop" not in note]
    assert pixels("out/seed0.png") == pixels(masked / "seed0.png")
    write_png(home / "mask.png", Image.fromarray(255 - half))
    (note,) = [note for note in notes_of(capsys, "--from", masked) if "crop" not in note]
    assert "mask.png" in note and str(masked / "mask0.png") in note and "SHA-256" in note
    assert pixels("out/seed0.png") == pixels(masked / "seed0.png")
    # A condition image in place of a photo that is gone has no parameters.
    (home / "drawing.png").unlink()
    again = read_settings(masked).to_request().controls[0]
    assert again.prepared and again.parameters is None and again.mask == str(masked / "mask0.png")
    write_png(masked / "mask0.png", Image.fromarray(255 - half))
    with refused("missing-file", "mask.png", masked / "mask0.png", "SHA-256"):
        read_settings(masked).to_request()
    (masked / "mask0.png").unlink()
    with refused("missing-file", "mask.png", masked / "mask0.png"):
        read_settings(masked).to_request()


def test_an_unknown_key_of_a_control_is_refused_with_the_nearest(drawn, capsys):
    assert run("generate", "red apple", "--control", "canny=drawing.png,wieght=1", "--steps", 1) == 2
    check(capsys.readouterr().err, "unknown-key", "'wieght'", "canny", "did you mean weight")


def test_graphs_that_were_demanded_are_not_demanded_on_another_machine(tmp_path):
    request = GenerateRequest(prompt="x", graphs="on")
    saved = SavedSettings(request, {}, {}, folder=tmp_path)
    assert saved.to_request().graphs == "auto" and saved.to_request(graphs="on").graphs == "on"


def test_a_mask_beside_saved_settings_brings_its_own_strength(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "drawing.png", Image.fromarray(DRAWING))
    write_png(tmp_path / "mask.png", Image.new("L", (64, 80), 255))
    run("generate", "red apple", "--image", "drawing.png", "--steps", 2, "--out", "first")
    run("generate", "red apple", "--image", "drawing.png", "--strength", 0.5, "--steps", 2, "--out", "given")
    for name, strength in (("first", 1.0), ("given", 0.5)):
        assert run("generate", "--from", name, "--mask", "mask.png", "--out", f"{name}-masked") == 0
        assert read_settings(tmp_path / f"{name}-masked").used["strength"] == strength


def test_a_second_pass_beside_saved_settings_tells_that_the_saved_image_is_enlarged(drawn, capsys):
    (drawn.parent / "home" / "drawing.png").unlink()
    (note, *_) = notes_of(capsys, "--from", drawn, "--hires", 1.5, "--steps", 2)
    assert "its saved condition image" in note and "enlarged for the second pass" in note


def test_changes_are_as_a_request_takes_them(drawn, tmp_path):
    stored = read_settings(drawn)
    use = ControlUse(control="canny", image=tmp_path / "drawing.png", weight=0.5)
    changed = stored.to_request(controls=(use,), loras=[LoraUse(file="x.safetensors")], seeds=(4,))
    assert changed.controls == (use,) and changed.loras == (LoraUse(file="x.safetensors"),)
    assert stored.to_request(image=Path("drawing.png")).image == "drawing.png"
    with refused("unknown-key", "promt"):
        stored.to_request(promt="x")
