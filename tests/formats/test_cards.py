"""A card beside every trained control, and sharing both."""

from __future__ import annotations

import json
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file, save_file

from controlkit.apps.cli import main
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.registry import find
from controlkit.formats.card import card_of, write_card
from controlkit.formats.convert import convert
from controlkit.formats.load import load_control, save_control, shipped_controls
from controlkit.formats.metadata import read_metadata
from refusals import check, refused
from tiny import OF_TRANSFORMERS, tiny_of_known


@pytest.fixture
def adapter(tiny_base, tmp_path):
    shared = BaseControlNet.for_base(tiny_base)
    save_control(tmp_path / "base.safetensors", shared, tiny_base)
    shared.add_adapter("mine", 2, seed=0)
    control = CtrLoRA(shared, "mine", "palette")
    return save_control(
        tmp_path / "mine.safetensors", control, tiny_base, companion="base", made={"steps": 7, "pairs": 12}
    )


def test_a_card_tells_what_the_file_tells(adapter, tiny_base):
    card = card_of(adapter, scores="| gap | 0.5 |", image="held-out.png", seconds=120, licence="apache-2.0")
    head = card.split("---")[1]
    assert "library_name: controlkit" in head and "license: apache-2.0" in head and '"palette"' in head
    for told in (
        "An adapter of CtrLoRA",
        "| rank | 2 |",
        "| steps | 7 |",
        "| gap | 0.5 |",
        "2.0 minutes",
        "held-out.png",
    ):
        assert told in card
    assert tiny_base.fingerprint in card
    assert (
        "Its base control, `base`, must be in the same folder" in card and "mine.safetensors+BASE_CONTROL=IMAGE" in card
    )


def test_a_card_does_not_ask_for_a_base_control_that_ships():
    card = card_of(shipped_controls()["nano/palette"])
    assert "ships with controlkit" in card and "same folder" not in card and "+BASE_CONTROL" not in card


def test_the_card_of_a_converted_control_does_not_make_up_its_base_and_its_base_control(adapter, base_folder, tmp_path):
    """As files of the original code, which record neither."""
    convert(adapter, tmp_path / "original.safetensors", "original")
    torch.save(load_file(tmp_path / "original.safetensors"), tmp_path / "lora.ckpt")
    converted = convert(tmp_path / "lora.ckpt", tmp_path / "converted.safetensors", "controlkit", base=str(base_folder))
    card = card_of(converted.path)
    assert "for a base that is not recorded." in card and "Its base control is not recorded; pass it:" in card
    assert "--base BASE " in card and "converted.safetensors+BASE_CONTROL=IMAGE" in card
    for made_up in ("None", "``", "|  |", "nano", "| base |"):
        assert made_up not in card
    tensors, facts = load_file(converted.path), read_metadata(converted.path)
    save_file(tensors, converted.path, {**facts, "modelspec.architecture": "stable-diffusion-v1/ctrlora"})
    assert "for a base of `stable-diffusion-v1`." in card_of(converted.path)


def test_the_card_of_an_adapter_whose_base_control_has_no_name_has_its_fingerprint(adapter):
    tensors, facts = load_file(adapter), read_metadata(adapter)
    fingerprint = facts["control.base_control_fingerprint"]
    save_file(tensors, adapter, {key: value for key, value in facts.items() if key != "control.base_control"})
    card = card_of(adapter)
    assert f"Its base control, `{fingerprint}`, must be in the same folder" in card
    assert f"| base control | {fingerprint} |" in card


def test_a_card_of_what_is_no_control_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with refused("wrong-kind", tmp_path / "other.safetensors", "control.kind"):
        card_of(tmp_path / "other.safetensors")


class Hub:
    """Stands for the hub's API and remembers what it is told."""

    told: ClassVar[list] = []
    refuses = False

    def create_repo(self, repository, private, exist_ok):
        if Hub.refuses:
            raise HfHubHTTPError("401 Unauthorized", response=type("R", (), {"headers": {}, "request": None})())
        Hub.told = [(repository, private)]
        return f"https://hub/{repository}"

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        Hub.told.append(path_in_repo)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "refuses", False)
    return Hub


def test_an_adapter_is_shared_with_its_base_control_its_card_and_its_images(adapter, hub, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "held-out.png")
    write_card(adapter, image="held-out.png")
    assert main(["push", str(adapter), "me/mine", "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub/me/mine"
    assert hub.told == [("me/mine", True), "mine.safetensors", "README.md", "base.safetensors", "held-out.png"]


def test_a_control_without_a_card_gets_one(tiny_control, tiny_base, hub, tmp_path):
    path = save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    assert main(["push", str(path), "me/canny"]) == 0
    assert "A ControlNet" in (tmp_path / "canny.md").read_text()


def test_no_connection_is_one_sentence_too(adapter, hub, monkeypatch, capsys):
    class Away(Exception):
        """As the errors of libraries for HTTP, which are of no class that Python knows."""

    def create_repo(self, *args, **kwargs):
        raise Away("[Errno -2] Name or service not known")

    monkeypatch.setattr(hub, "create_repo", create_repo)
    assert main(["push", str(adapter), "me/mine"]) == 2
    told = capsys.readouterr().err
    check(told, "upload-failed", "Name or service not known")
    assert told.count("\n") == 1


@pytest.mark.parametrize(("name", "code"), [("", "wrong-kind"), ("missing.safetensors", "missing-file")])
def test_what_is_no_file_is_not_shared(adapter, hub, capsys, name, code):
    assert main(["push", str(adapter.parent / name), "me/mine"]) == 2
    check(capsys.readouterr().err, code, adapter.parent / name)


def test_a_refusal_of_the_hub_is_one_sentence(adapter, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "refuses", True)
    assert main(["push", str(adapter), "me/mine"]) == 2
    told = capsys.readouterr().err
    check(told, "upload-failed", "mine.safetensors", "me/mine")
    assert "Traceback" not in told


def test_a_card_does_not_pick_files_of_this_machine(adapter, hub, tmp_path):
    outside = tmp_path.parent / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    shown = (outside, "../outside.png", "secret.txt", "pictures/a.png")
    adapter.with_suffix(".md").write_text("\n".join(f"![x]({path})" for path in shown))
    assert main(["push", str(adapter), "me/mine"]) == 0
    assert hub.told[1:] == ["mine.safetensors", "README.md", "base.safetensors", "pictures/a.png"]


def test_images_are_found_however_the_card_shows_them(adapter, hub, tmp_path, capsys):
    names = ["sheet.PNG", "title.png", "sp ace.png", "angle d.png", "a(1).png", "tag.png", "double tag.jpg", "in.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    adapter.with_suffix(".md").write_text(
        """![a](sheet.PNG) ![b [c]](title.png "a title") ![d](sp%20ace.png) ![e](<angle d.png>) ![f](a(1).png)
        <img width=8 src=tag.png> <IMG SRC="double tag.jpg"/> [![g](in.png)](https://example.org/a.png)
        ![h](https://example.org/h.png) ![i](data:image/png;base64,AAAA) ![j](http://[) ![k](%00.png)
        [the control](mine.safetensors) [a discussion](discussions/1) [below](#usage)"""
    )
    assert main(["push", str(adapter), "me/mine"]) == 0
    assert sorted(hub.told[1:]) == sorted(["mine.safetensors", "README.md", "base.safetensors", *names])
    assert capsys.readouterr().err == ""


def test_files_of_a_card_that_are_not_uploaded_are_noted(adapter, hub, tmp_path, capsys):
    for name in ("notes.txt", "drawing.svg", "photo.png"):
        (tmp_path / name).write_text("x")
    adapter.with_suffix(".md").write_text(
        "![a](gone.png) ![b](drawing.svg) <img src='../far.png'> [notes](notes.txt) [photo](photo.png) [c](LICENSE)"
    )
    assert main(["push", str(adapter), "me/mine", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    notes = json.loads(printed.out)["notes"]
    assert printed.err.splitlines() == [f"note: {note}" for note in notes]
    expected = {"gone.png": "exist", "drawing.svg": ".png", "../far.png": "outside", "notes.txt": "", "photo.png": ""}
    assert len(notes) == len(expected)
    for note, (name, reason) in zip(notes, expected.items(), strict=True):
        assert f" {name}, " in note and reason in note
    assert main(["push", str(adapter), "me/mine"]) == 0
    assert capsys.readouterr().err == printed.err


def test_the_base_control_that_goes_along_is_the_one_of_the_fingerprint(adapter, hub, tiny_base, tmp_path):
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    another = BaseControlNet.for_base(tiny_base)
    with torch.no_grad():
        another.network.conv_in.weight.add_(1)
    save_control(tmp_path / "base.safetensors", another, tiny_base)
    assert main(["push", str(adapter), "me/mine"]) == 0
    assert hub.told[1:] == ["mine.safetensors", "README.md", "moved.safetensors"]


@pytest.mark.parametrize("name", ["bad name/x y", "a/b/c", "https://huggingface.co/a/b"])
def test_a_name_that_the_hub_does_not_take_is_refused(name, adapter, hub, capsys):
    for words in ([], ["--dry-run"]):
        assert main(["push", str(adapter), name, *words]) == 2
        check(capsys.readouterr().err, "usage", name)


def test_a_dry_run_lists_what_would_be_uploaded_and_does_nothing(adapter, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "told", [])
    assert main(["push", str(adapter), "me/mine", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" -> ")[1].split(" ")[0] for line in lines] == [
        "me/mine/mine.safetensors",
        "me/mine/README.md",
        "me/mine/base.safetensors",
    ]
    assert hub.told == [] and not adapter.with_suffix(".md").exists()
    assert main(["push", str(adapter), "me/mine", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["mine.safetensors"] == str(adapter)


def test_only_controls_are_uploaded_whatever_lies_beside_them(adapter, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hub, "told", [])
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("pickle.pth", "other.safetensors"):
        (tmp_path / name).with_suffix(".md").write_text("a card")
        assert main(["push", str(tmp_path / name), "me/mine"]) == 2
        check(capsys.readouterr().err, "wrong-kind", tmp_path / name)
    card = adapter.with_suffix(".md")
    card.write_bytes("caf\u00e9".encode("latin-1"))
    assert main(["push", str(adapter), "me/mine"]) == 2
    check(capsys.readouterr().err, "damaged-file", card, "UTF-8")
    assert main(["push", "nano/canny", "me/mine"]) == 2
    check(capsys.readouterr().err, "unsupported", "nano/canny", "ships")
    assert hub.told == []


def test_a_control_trained_in_this_folder_is_pushed_by_its_name(adapter, hub, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    assert main(["push", adapter.stem, "me/mine"]) == 0
    assert hub.told[1] == adapter.name


def test_offline_is_said(adapter, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(adapter), "me/mine"]) == 2
    check(capsys.readouterr().err, "upload-failed", "HF_HUB_OFFLINE", "mine.safetensors")


def test_inspect_is_sorted_and_short(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    names = [row for row in rows if row.startswith("metadata.")]
    assert names == sorted(names) and len(rows) < 60


def test_the_same_control_is_saved_as_the_same_bytes(adapter, tiny_base, tmp_path):
    saved = [
        save_control(tmp_path / str(number) / "canny.safetensors", control, tiny_base, made={"note": "ä\n"})
        for number, control in enumerate([load_control("canny")] * 4)
    ]
    assert len({path.read_bytes() for path in saved}) == 1
    assert json.loads(read_metadata(saved[0])["control.made"]) == {"note": "ä\n"}


def test_a_control_lora_is_a_lora_for_other_tools(tmp_path):
    base = tiny_of_known("flux1-dev")
    path = save_control(tmp_path / "mine.safetensors", find("flux-control-lora").for_base(base, "canny"), base)
    assert read_metadata(path)["modelspec.architecture"] == f"{base.architecture}/lora"
    assert '["lora", "spatial-control", "canny"]' in card_of(path)


@pytest.mark.parametrize(
    "system", ["controlnet-union", *(name for name in OF_TRANSFORMERS if name.startswith("controlnet"))]
)
def test_a_controlnet_of_any_family_is_one_for_other_tools(system, tiny_base, tmp_path):
    base = tiny_of_known(OF_TRANSFORMERS[system]) if system in OF_TRANSFORMERS else tiny_base
    path = save_control(tmp_path / "mine.safetensors", find(system).for_base(base, "canny"), base)
    assert read_metadata(path)["modelspec.architecture"] == f"{base.architecture}/control-net"
    assert '["controlnet", "spatial-control", "canny"]' in card_of(path)
