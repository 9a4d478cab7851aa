"""The verb `convert`: files between layouts, and what it says to bad input."""

from __future__ import annotations

import json

import pytest
import torch

from controlkit.apps.cli import main
from controlkit.checkpoints.controls import load_control, save_control
from controlkit.checkpoints.ctrlora import save_base_control
from controlkit.checkpoints.files import read_metadata
from controlkit.controls.base_control import BaseControl


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def file(tiny_control, tiny_base, tmp_path):
    return save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base, dtype=torch.float32)


def test_convert_reports_what_it_wrote(file, tmp_path, tiny_base, capsys):
    assert run("convert", file, tmp_path / "folder", "--to", "diffusers", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["layout"], told["from"]["layout"]) == ("controlnet", "diffusers", "controlkit")
    assert set(told["dtypes"]) == {"float32"}
    again = tmp_path / "again.safetensors"
    words = ("convert", tmp_path / "folder", again, "--to", "original", "--dtype", "float16", "--condition", "hed")
    assert run(*words) == 0
    assert "diffusers -> original" in capsys.readouterr().out
    assert read_metadata(again)["control.condition"] == "hed"
    assert load_control(again, tiny_base).condition == "hed"


def test_a_control_that_ships_is_found_by_its_name(tmp_path, capsys):
    assert run("convert", "canny", tmp_path / "canny.safetensors", "--to", "original") == 0
    assert run("inspect", tmp_path / "canny.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layout"] == "original"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("IN", "out.safetensors", "--to", "orignal"), "did you mean original"),
        (("IN", "out.pth", "--to", "original"), "never as pickles"),
        (("IN", "out.safetensors", "--to", "original", "--dtype", "fp8"), "expected one of float32"),
        (("IN", "out.safetensors", "--to", "peft"), "cannot carry"),
        (("IN", "out.safetensors", "--to", "merged"), "cannot carry"),
        (("IN", "out.safetensors", "--to", "difference"), "--base"),
        (("IN", "out.safetensors", "--to", "control-lora", "--base", "nano", "--rank", "0"), "--rank 0"),
        (("IN", "out.safetensors", "--to", "difference", "--base", "nano"), "not made for the base"),
        (("IN", "out.safetensors", "--to", "original", "--base", "nowhere"), "no base"),
        (("IN", "out.safetensors", "--to", "full"), "only a file of layout full"),
        (("IN", "IN", "--to", "diffusers"), "is a file"),
        (("nothing.pth", "out.safetensors", "--to", "original"), "no control called"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(file, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run("convert", *(file if word == "IN" else word for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("controlkit: ") and err.count("\n") == 1
    assert says in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_control_in_another_type_says_its_own_fingerprint(tiny_base, tmp_path):
    shared = BaseControl.for_base(tiny_base)
    file = save_base_control(tmp_path / "base.safetensors", shared, tiny_base, dtype=torch.float32)
    out = tmp_path / "half.safetensors"
    assert run("convert", file, out, "--to", "controlkit", "--dtype", "bfloat16") == 0
    said = read_metadata(out)["control.fingerprint"]
    assert said == load_control(out, tiny_base).fingerprint() != read_metadata(file)["control.fingerprint"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "controlkit", "--condition", "cany"], "did you mean canny"),
        (["--to", "diffusers", "--rank", "4"], "--to control-lora"),
        (["--to", "controlkit", "--base-control", "nano/base"], "for an adapter of CtrLoRA"),
    ],
)
def test_options_that_would_do_nothing_are_refused(file, tmp_path, capsys, words, says):
    assert run("convert", file, tmp_path / "new.safetensors", *words) == 2
    assert says in capsys.readouterr().err
    assert run("convert", file, file, "--to", "original") == 2
    assert "is the control itself" in capsys.readouterr().err
