"""Names of controls: a path, a control trained in this folder, or a shipped control."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from controlkit.apps import transfer
from controlkit.formats.load import control_files, find_control, recorded_condition, shipped_controls, split_pair
from refusals import refused


@pytest.mark.parametrize("place", ["runs/mine/mine.safetensors", "mine.safetensors"])
def test_a_trained_control_is_found_by_its_name_in_the_folder_where_it_was_trained(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("missing-file", "'mine'"):
        find_control("mine")
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(shipped_controls()["nano/palette"], place)
    assert find_control("mine") == Path(place)
    assert recorded_condition("mine") == "palette"


def test_a_folder_of_pairs_does_not_hide_the_control_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("canny").mkdir()
    (Path("canny") / "0.png").write_bytes(b"")
    assert find_control("canny") == shipped_controls()["canny"]
    Path("palette").mkdir()
    assert find_control("palette") == shipped_controls()["nano/palette"]
    Path("mine").mkdir()
    assert find_control("mine") == Path("mine")
    own = Path("runs/canny/canny.safetensors")
    own.parent.mkdir(parents=True)
    shutil.copy(shipped_controls()["nano/palette"], own)
    assert find_control("canny") == own
    (Path("canny") / "config.json").write_text("{}")
    assert find_control("canny") == Path("canny")


@pytest.mark.parametrize("name", ["prompt.json", "metadata.json"])
def test_pairs_with_json_files_do_not_hide_it_either(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("canny").mkdir()
    (Path("canny") / name).write_text("{}")
    assert find_control("canny") == shipped_controls()["canny"]
    (Path("canny") / "adapter_config.json").write_text("{}")
    assert find_control("canny") == Path("canny")


def test_an_adapter_and_its_base_control_are_named_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_controls()
    base = shipped["nano/base"]
    shutil.copy(shipped["nano/palette"], "mine.safetensors")
    for adapter in ("nano/canny", "palette", "mine", "mine.safetensors"):
        for companion in ("nano/base", base):
            assert split_pair(f"{adapter}+{companion}") == (adapter, base)
            assert control_files(f"{adapter}+{companion}") == [find_control(adapter), base]
    shutil.copy(shipped["nano/palette"], "a+b.safetensors")
    for name in ("a+b.safetensors", "a+b", "nothing+nano/base"):
        assert split_pair(name) == (name, None)
    with refused("missing-file", "'nothing'"):
        split_pair("nano/canny+nothing")
    with refused("wrong-kind", "transfer its base control"):
        main_transfer("nano/canny+nano/base")


def main_transfer(name):
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    transfer.run(parser.parse_args([name, "--from", "nano", "--to", "nano", "--out", "out.safetensors"]))


def test_a_trained_control_comes_before_a_shipped_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_control("canny") == shipped_controls()["canny"]
    own = Path("runs/canny/canny.safetensors")
    own.parent.mkdir(parents=True)
    shutil.copy(shipped_controls()["nano/palette"], own)
    assert find_control("canny") == own
