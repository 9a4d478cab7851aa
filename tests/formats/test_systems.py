"""What systems and bases are, against the figures of the papers' code at full size."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlkit.apps.cli import main
from controlkit.controls.gligen import GLIGEN
from controlkit.formats.convert import reference_for
from controlkit.formats.describe import describe, describe_base, describe_system, is_base
from controlkit.formats.load import save_control, shipped_controls
from controlkit.formats.metadata import read_metadata
from refusals import refused


@functools.cache
def facts_of(system: str, base: str) -> dict[str, Any]:
    """`describe_system` at 512 x 512: it runs the whole base on the meta device several times, seconds each."""
    return describe_system(system, base, size=512)


@pytest.mark.parametrize(
    ("base", "parameters", "tensors"),
    [("sd15", 361_279_120, 340), ("sd21", 364_228_240, 340), ("sdxl", 1_251_014_160, 844)],
)
def test_a_controlnet_has_the_known_size(base, parameters, tensors):
    facts = facts_of("controlnet", base)
    assert (facts["parameters"], facts["tensors"]) == (parameters, tensors)
    assert facts["trainable"] == parameters


def test_operations_at_512_are_those_that_are_known():
    """Within 2 % of 803 for the UNet, 283 for the ControlNet with its hint network, 1117 for the autoencoder."""
    base = describe_base("sd15", 512)["GFLOP at 512 x 512"]
    assert base["UNet call"] == pytest.approx(803, rel=0.02)
    assert base["autoencoder, encoding"] == pytest.approx(1117, rel=0.02)
    control = facts_of("controlnet", "sd15")["GFLOP at 512 x 512"]
    assert control["each step of each image"] + control["once for a condition"] == pytest.approx(283, rel=0.02)
    ctrlora = describe_system("ctrlora", "sd15", size=512)["GFLOP at 512 x 512"]
    assert ctrlora["once a step"] == control["each step of each image"]
    assert ctrlora["once for a condition"] == base["autoencoder, encoding"]


@pytest.mark.parametrize(
    ("base", "parameters", "grey", "network"),
    [("sd15", 77_369_280, 77_000_640, "full_adapter"), ("sdxl", 79_028_160, 77_553_600, "full_adapter_xl")],
)
def test_a_t2i_adapter_has_the_known_size(base, parameters, grey, network):
    """77.37M for colour, 77.0M for grey, 18.69M light, 79.0M for SDXL; 59.9 GFLOP once at 512 x 512."""
    facts = facts_of("t2i-adapter", base)
    assert (facts["parameters"], facts["trainable"], facts["network"]) == (parameters, parameters, network)
    assert facts["for grey images"]["parameters"] == grey
    assert (facts["reads"], facts["enters at"]) == ("nothing", "encoder stages")
    if base == "sd15":
        assert facts["light"]["parameters"] == 18_689_200
        assert facts["GFLOP at 512 x 512"]["once for a condition"] == pytest.approx(59.9, rel=0.02)


def test_every_base_that_verbs_take_can_be_inspected(tmp_path, monkeypatch):
    """A single file is told by its names and shapes; a hub id by its form; no control is taken for one."""
    names = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x", "cond_stage_model.transformer.x")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert is_base(str(tmp_path / "model.safetensors"))
    assert describe_system("controlnet", str(tmp_path / "model.safetensors"), size=512)["parameters"] == 361_279_120
    with refused("damaged-file", tmp_path / "model.safetensors", "sd15"):
        describe_base(str(tmp_path / "model.safetensors"))
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "no.safetensors")
    (tmp_path / "empty.safetensors").touch()
    assert is_base("somebody/model") and is_base("nano") and is_base("sd21")
    for name in (tmp_path / "no.safetensors", tmp_path / "empty.safetensors", "nano/base", "a/missing.safetensors"):
        assert not is_base(str(name))


def test_a_rank_that_is_none_is_refused():
    with refused("out-of-range", "rank", "0", "1 or more"):
        describe_system("ctrlora", "nano", rank=0)


@pytest.mark.parametrize("resolution", ["513x513", "\u00b2x\u00b2", "0x0", "", "wide"])
def test_a_recorded_resolution_that_does_not_fit_does_not_count(tmp_path, resolution):
    shipped, file = shipped_controls()["canny"], tmp_path / "canny.safetensors"
    save_file(load_file(shipped), file, {**read_metadata(shipped), "modelspec.resolution": resolution})
    assert describe(str(file))["GFLOP at 64 x 64"] == describe("canny")["GFLOP at 64 x 64"]


def test_a_size_at_which_nothing_is_counted_is_refused(tiny_base, tmp_path):
    gligen = save_control(tmp_path / "gligen.safetensors", GLIGEN.for_base(tiny_base), tiny_base)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in (gligen, tmp_path / "other.safetensors"):
        with refused("contradiction", "--size 128", name):
            describe(str(name), size=128)
    with refused("contradiction", "--size 128", "gligen"):
        describe_system("gligen", "nano", size=128)


def test_a_misspelled_name_of_what_ships_is_not_asked_of_the_hub():
    assert not is_base("nano/cany") and is_base("somebody/model")


def test_ctrlora_has_the_known_size(capsys):
    assert main(["inspect", "ctrlora", "--base", "sd15", "--rank", "128", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base control"]["parameters"] == 360_192_640
    adapter = facts["adapter of rank 128"]
    assert (adapter["parameters"], adapter["tensors"]) == (36_945_536, 246)
    assert (adapter["lora"], adapter["zero_convolutions"], adapter["norms"]) == (25_419_776, 11_479_680, 46_080)


def test_known_bases_are_told_without_their_files(capsys):
    assert main(["inspect", "sdxl", "--size", "1024", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["unet"]["parameters"] == 2_567_463_684
    assert facts["text encoder 2"]["parameters"] == 694_659_840
    assert facts["own size"] == "1024 x 1024"


def test_a_size_that_does_not_fit_is_refused():
    with refused("wrong-size", "500", "multiple of 8"):
        describe_base("sd15", 500)


def test_a_base_whose_settings_are_not_whole_is_refused(base_folder):
    (base_folder / "unet" / "config.json").write_text("{}")
    with refused("damaged-file", "unet/config.json", "block_out_channels, in_channels"):
        describe_system("controlnet", str(base_folder))


def test_a_folder_that_is_called_as_a_known_base_is_the_base(base_folder, monkeypatch):
    base_folder.rename(base_folder.with_name("sd15"))
    assert describe_base("sd15")["parameters"] > 100_000_000
    monkeypatch.chdir(base_folder.parent)
    assert is_base("sd15") and describe_base("sd15")["parameters"] < 1_000_000
    assert reference_for("sd15").unet_weights is not None
