"""Names of controls: a path, a control trained in this folder, or a shipped control."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from controlkit.formats.load import find_control, recorded_condition, shipped_controls
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


def test_a_trained_control_comes_before_a_shipped_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_control("canny") == shipped_controls()["canny"]
    own = Path("runs/canny/canny.safetensors")
    own.parent.mkdir(parents=True)
    shutil.copy(shipped_controls()["nano/palette"], own)
    assert find_control("canny") == own
