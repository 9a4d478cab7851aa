"""Names -> models: what is listed, and how clients' names are matched."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from controlkit.bases.load import load_base
from controlkit.formats.load import load_control, save_control, shipped_controls
from controlkit.server.catalogue import list_models
from refusals import refused


@pytest.fixture(scope="module")
def catalogue(models):
    folders = {kind: [str(models / kind)] for kind in ("controls", "loras", "vaes")}
    return list_models(**folders)


def test_files_and_folders_are_listed_by_their_names(catalogue, models):
    assert list(catalogue.bases) == ["nano"] and catalogue.base == "nano"
    assert catalogue.loras == {"styles/wild": str(models / "loras" / "styles" / "wild.safetensors")}
    assert catalogue.vaes == {"own": str(models / "vaes" / "own")}
    assert {"canny", "nano/palette", "Edges_v2"} <= set(catalogue.controls)


def test_what_is_no_control_is_named_and_base_controls_are_no_choice(catalogue):
    assert "broken" not in catalogue.controls and "nano/base" not in catalogue.controls
    (note,) = catalogue.skipped
    assert note.startswith("broken: ")


def test_a_folder_of_bases_and_a_base_are_told_apart(base_folder):
    alone, folder = [list_models(bases=[str(path)]) for path in (base_folder, base_folder.parent)]
    assert alone.bases == folder.bases == {"base": str(base_folder)}
    assert alone.controls == {}  # those of nano are for nano
    assert list(list_models(bases=["nano", str(base_folder)]).bases) == ["nano", "base"]


@pytest.mark.parametrize("name", ["Edges_v2", "edges_V2", "Edges_v2.safetensors", "Edges_v2 [0123abcd]", " edges_v2 "])
def test_names_are_matched_as_clients_send_them(catalogue, name):
    assert catalogue.find("controls", name) == "Edges_v2"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../Edges_v2", "controls/Edges_v2", "broken", "[", "canny]"])
def test_names_that_are_not_listed_are_refused(catalogue, name):
    with refused("unknown-name", repr(name)):
        catalogue.find("controls", name)


def test_paths_do_not_leave_the_server(catalogue, models):
    text = f"{models / 'controls' / 'Edges_v2.safetensors'} does not fit nano"
    assert catalogue.without_paths(text) == "Edges_v2 does not fit nano"
    text = f"put its file into {models / 'controls'}, such as {models / 'controls' / 'other.safetensors'}"
    assert catalogue.without_paths(text) == "put its file into controls, such as other.safetensors"
    assert catalogue.without_paths(str(shipped_controls()["nano/palette"])) == "nano/palette"


def test_base_controls_are_listed_for_training_and_found_by_adapters_of_other_folders(tmp_path):
    nano_base = load_base("nano")
    changed = load_control(shipped_controls()["nano/base"], nano_base)
    with torch.no_grad():
        next(changed.parameters()).add_(0.25)
    for folder in ("bases", "adapters", "lost"):
        (tmp_path / folder).mkdir()
    base = save_control(tmp_path / "bases" / "mine.safetensors", changed, nano_base)
    adapter = load_control(shipped_controls()["nano/palette"], nano_base, shared={})
    file = tmp_path / "adapters" / "colours.safetensors"
    save_control(file, adapter, nano_base, companion="mine")
    with safe_open(file, "pt") as opened:
        state, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    with safe_open(base, "pt") as opened:
        fingerprint = opened.metadata()["control.fingerprint"]
    save_file(state, file, {**metadata, "control.base_control_fingerprint": fingerprint})
    catalogue = list_models(controls=[str(tmp_path / "bases"), str(tmp_path / "adapters")])
    assert catalogue.base_controls == {"nano/base": str(shipped_controls()["nano/base"]), "mine": str(base)}
    assert "mine" not in catalogue.controls
    found = load_control(catalogue.controls["colours"].path, nano_base)
    assert found.base_control.fingerprint() == fingerprint
    offered = list_models(controls=[str(tmp_path / "bases")]).with_control("colours", file)
    assert offered.controls["colours"].path == catalogue.controls["colours"].path
    assert catalogue.without_paths(f"{catalogue.controls['colours'].path}: {base}") == "colours: mine"


def test_a_folder_of_peft_is_one_lora(tmp_path):
    folder = tmp_path / "ink"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert list_models(loras=[str(tmp_path)]).loras == {"ink": str(folder)}


def test_folders_that_do_not_exist(tmp_path):
    with refused("missing-file", "--loras", tmp_path / "none"):
        list_models(loras=[str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with refused("empty-data", "empty"):
        list_models(bases=[str(tmp_path / "empty")])


@pytest.mark.parametrize("kind", ["loras", "vaes", "embeddings"])
def test_of_files_with_the_same_name_the_first_is_listed_and_the_others_are_named(tmp_path, kind):
    for file in ("a/ink.ckpt", "a/ink.safetensors", "b/ink.pt", "b/oil.pt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    catalogue = list_models(**{kind: [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a")]})
    kept = tmp_path / "a" / "ink.safetensors"
    assert getattr(catalogue, kind) == {"ink": str(kept), "oil": str(tmp_path / "b" / "oil.pt")}
    lost = {str(tmp_path / file) for file in ("a/ink.ckpt", "b/ink.pt")}
    assert all(note.startswith("ink: ") and str(kept) in note for note in catalogue.skipped)
    assert {path for path in lost if any(path in note for note in catalogue.skipped)} == lost


def test_a_control_replaces_no_other_and_a_shipped_one_with_a_note(tmp_path):
    shipped = shipped_controls()
    for folder, name, source in (("a", "mine", "canny"), ("b", "mine", "nano/palette"), ("b", "canny", "nano/palette")):
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(shipped[source], tmp_path / folder / f"{name}.safetensors")
    catalogue = list_models(controls=[str(tmp_path / "a"), str(tmp_path / "b")])
    assert catalogue.controls["mine"].path == str(tmp_path / "a" / "mine.safetensors")
    assert catalogue.controls["canny"].path == str(tmp_path / "b" / "canny.safetensors")
    assert sorted(note.partition(":")[0] for note in catalogue.skipped) == ["canny", "mine"]
    assert all(str(tmp_path / "b") in note for note in catalogue.skipped)


def test_of_textual_inversions_with_one_word_the_first_is_listed(tmp_path):
    for name in ("a/cat", "b/Cat", "b/dog"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"emb_params": torch.zeros(1, 8)}, tmp_path / f"{name}.safetensors")
    catalogue = list_models(embeddings=[str(tmp_path)])
    assert list(catalogue.embeddings) == ["a/cat", "b/dog"]
    assert catalogue.embeddings_in("a cat and a dog") == ["a/cat", "b/dog"]
    (note,) = catalogue.skipped
    assert note.startswith("b/Cat: ") and "a/cat" in note
