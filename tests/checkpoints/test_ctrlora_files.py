"""CtrLoRA's files: a base control, and adapters that find it."""

from __future__ import annotations

import shutil

import pytest
import torch

from controlkit.checkpoints.controls import load_control
from controlkit.checkpoints.ctrlora import save_adapter, save_base_control
from controlkit.checkpoints.files import read_metadata
from controlkit.controls.base_control import BaseControl
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.errors import UserError


@pytest.fixture
def saved(tiny_base, tmp_path):
    """A base control with two adapters that steer, in files of float32."""
    torch.manual_seed(0)
    shared = BaseControl.for_base(tiny_base)
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
    save_base_control(tmp_path / "base.safetensors", shared, tiny_base, dtype=torch.float32)
    for control in controls:
        path = tmp_path / f"{control.condition}.safetensors"
        save_adapter(path, control, tiny_base, "base", made={"steps": 7}, dtype=torch.float32)
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
        for mine, theirs in zip(residuals(control, tiny_base).down, residuals(loaded, tiny_base).down, strict=True):
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
    with pytest.raises(UserError, match=r"adapter of the base control 'base'.*put its file into"):
        load_control(alone / "palette.safetensors", tiny_base)


def test_another_base_control_under_the_same_name_is_not_taken(saved, tiny_base):
    folder, _ = saved
    other = BaseControl.for_base(tiny_base)
    save_base_control(folder / "base.safetensors", other, tiny_base)
    with pytest.raises(UserError, match="adapter of the base control"):
        load_control(folder / "palette.safetensors", tiny_base)


def test_a_base_control_of_another_base_is_refused(saved):
    import tiny

    wide = tiny.build_tiny_base(text_width=24)
    with pytest.raises(UserError, match="does not fit the base tiny: its text width"):
        load_control(saved[0] / "palette.safetensors", wide)
