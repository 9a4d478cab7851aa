"""CtrLoRA's files: a base control, and adapters that find it."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from refusals import refused


@pytest.fixture
def saved(tiny_base, tmp_path):
    """A base control with two adapters that steer, in files of float32."""
    torch.manual_seed(0)
    shared = BaseControlNet.for_base(tiny_base)
    with torch.no_grad():
        for parameter in shared.network.controlnet_down_blocks.parameters():
            parameter.normal_()
    controls = []
    for rank, name in ((2, "palette"), (3, "blur")):
        adapter = shared.add_adapter(name, rank, seed=rank)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        controls.append(CtrLoRA(shared, name, name))
    save_control(tmp_path / "base.safetensors", shared, tiny_base, dtype=torch.float32)
    for control in controls:
        path = tmp_path / f"{control.condition}.safetensors"
        save_control(path, control, tiny_base, companion="base", made={"steps": 7}, dtype=torch.float32)
    return tmp_path, controls


def residuals(control, base):
    hint = control.encode(torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64), base)
    return control(None, torch.tensor([400]), base.encode_text(["red apple"]), hint)


def test_adapters_load_on_one_shared_base_control_and_give_the_same_residuals(saved, tiny_base):
    folder, controls = saved
    shared: dict = {}
    for control in controls:
        loaded = load_control(folder / f"{control.condition}.safetensors", tiny_base, shared=shared)
        assert loaded.condition == control.condition
        for mine, theirs in zip(
            residuals(control, tiny_base).tensors(), residuals(loaded, tiny_base).tensors(), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len(shared) == 1


def test_an_adapter_says_what_it_needs(saved):
    metadata = read_metadata(saved[0] / "palette.safetensors")
    assert metadata["control.kind"] == "ctrlora"
    assert metadata["control.rank"] == "2"
    assert metadata["control.base_control_fingerprint"] == saved[1][0].base_control.fingerprint()


def test_an_adapter_without_its_base_control_names_it(saved, tiny_base, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(saved[0] / "palette.safetensors", alone)
    with refused("missing-companion", alone / "palette.safetensors", "base control 'base'", alone, "ADAPTER+BASE"):
        load_control(alone / "palette.safetensors", tiny_base)


def test_another_base_control_under_the_same_name_is_not_taken(saved, tiny_base):
    folder, _ = saved
    other = BaseControlNet.for_base(tiny_base)
    save_control(folder / "base.safetensors", other, tiny_base)
    with refused("missing-companion", folder / "palette.safetensors", "base control", folder):
        load_control(folder / "palette.safetensors", tiny_base)


def test_a_base_control_of_another_base_is_refused(saved):
    import tiny

    wide = tiny.build_tiny_base(text_width=24)
    with refused("incompatible", "palette.safetensors", "tiny", "text width"):
        load_control(saved[0] / "palette.safetensors", wide)


def test_a_base_control_held_in_bfloat16_is_the_one_that_its_adapters_were_made_on(saved, tiny_base):
    folder, controls = saved
    said = read_metadata(folder / "base.safetensors")["control.fingerprint"]
    base = copy.deepcopy(tiny_base).to(dtype=torch.bfloat16)
    assert base.fingerprint == tiny_base.fingerprint
    loaded = load_control(folder / "palette.safetensors", base)
    assert loaded.base_control.network.dtype == torch.bfloat16
    assert loaded.base_control.fingerprint() == said == controls[0].base_control.fingerprint()
    loaded.base_control.train_base()
    assert loaded.base_control.fingerprint() != said  # of weights that may change from here on


def test_a_base_control_written_in_bfloat16_says_the_fingerprint_of_what_it_holds(saved, tiny_base, tmp_path):
    control = saved[1][0].base_control
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        path = save_control(tmp_path / f"{dtype}.safetensors", control, tiny_base, dtype=dtype)
        said = read_metadata(path)["control.fingerprint"]
        assert said == load_control(path).fingerprint()
        assert (said == control.fingerprint()) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("name", ["a-broken", "base"])
def test_a_broken_base_control_beside_an_adapter_does_not_hide_the_right_one(saved, tiny_base, name):
    folder, _ = saved
    (folder / "base.safetensors").rename(folder / "moved.safetensors")
    whole = load_file(folder / "moved.safetensors")
    del whole["mid_block.resnets.0.norm1.weight"]
    save_file(whole, folder / f"{name}.safetensors")
    assert load_control(folder / "palette.safetensors", tiny_base).condition == "palette"
    (folder / f"{name}.safetensors").write_bytes((folder / "moved.safetensors").read_bytes()[:-1000])
    assert load_control(folder / "palette.safetensors", tiny_base).condition == "palette"


def bare_of(source, path):
    """The adapter as the reference writes it: without metadata."""
    save_file(load_file(convert(source, path, "original").path), path)
    return path


def test_a_merged_adapter_is_no_base_control_of_another(saved, tiny_base, tmp_path):
    folder, _ = saved
    convert(folder / "palette.safetensors", tmp_path / "pair" / "merged.safetensors", "merged")
    adapter = bare_of(folder / "blur.safetensors", tmp_path / "pair" / "blur.safetensors")
    with refused("missing-companion", adapter, "its folder has none"):
        load_control(adapter, tiny_base)
    with refused("wrong-kind", "merged.safetensors is a control of palette", adapter):
        load_control(f"{adapter}+{tmp_path / 'pair' / 'merged.safetensors'}", tiny_base)
    shutil.copy(folder / "base.safetensors", tmp_path / "pair" / "base.safetensors")
    assert load_control(adapter, tiny_base)


def test_a_cast_base_control_does_not_replace_the_one_that_was_trained_on(saved, tiny_base, tmp_path):
    folder, _ = saved
    adapter, half = folder / "palette.safetensors", tmp_path / "half" / "base.safetensors"
    convert(folder / "base.safetensors", half, "controlkit", dtype="bfloat16")
    again = convert(adapter, tmp_path / "again" / "palette.safetensors", "controlkit", base_control=half).path
    assert read_metadata(again) == read_metadata(adapter)
    for base_control in (folder / "base.safetensors", half):
        assert load_control(f"{again}+{base_control}", tiny_base)


def test_a_conversion_tells_what_it_wrote_and_what_it_did_not(saved, tiny_base, base_folder, tmp_path):
    folder, _ = saved
    merged = convert(folder / "palette.safetensors", tmp_path / "merged.safetensors", "merged")
    written = load_file(merged.path)
    told = merged.to_json()
    assert (told["kind"], told["tensors"]) == ("ctrlora-base", len(written))
    assert told["parameters"] == sum(value.numel() for value in written.values())
    card = card_of(merged.path)
    assert f'controlkit generate "PROMPT" --base {tiny_base.name}' in card and "controlkit adapt" not in card

    tensors = load_file(convert(folder / "base.safetensors", tmp_path / "b.safetensors", "original").path)
    tensors = {name: value for name, value in tensors.items() if ".lora_layer." not in name}
    tensors |= load_file(convert(folder / "palette.safetensors", tmp_path / "a.safetensors", "original").path)
    save_file({**tensors, "model.diffusion_model.x": torch.zeros(1)}, tmp_path / "whole.safetensors")
    out = tmp_path / "out" / "palette.safetensors"
    made = convert(tmp_path / "whole.safetensors", out, "controlkit", base=str(base_folder), condition="palette")
    assert any("its base control" in note and "--to merged" in note for note in made.notes)
