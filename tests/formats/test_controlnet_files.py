"""Files of a ControlNet, ours and diffusers', and files that are something else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlkit.controls.controlnet import ControlNet
from controlkit.controls.file_format import Checkpoint
from controlkit.errors import UserError
from controlkit.formats import load as files
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl, Plan
from refusals import refused
from tiny import build_tiny_base, fresh_control


@pytest.fixture
def saved(tmp_path, tiny_control, tiny_base):
    return save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base, made={"steps": 7})


def residuals(control, base):
    generator = torch.Generator().manual_seed(0)
    x_t, image = torch.randn(2, 4, 16, 16, generator=generator), torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        made = control(x_t, torch.tensor([10, 900]), base.encode_text(["a", "b"]), control.encode(image, base))
    return list(made.tensors())


def furthest(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def not_loaded(path, code, *facts, base=None):
    with refused(code, *facts) as caught:
        load_control(path, base)
    assert "\n" not in str(caught.value)


def test_float32_comes_back_exactly(tmp_path, tiny_control, tiny_base):
    path = save_control(tmp_path / "a.safetensors", tiny_control, tiny_base, dtype=torch.float32)
    control = load_control(path, tiny_base)
    mine, back = tiny_control.state_dict(), control.state_dict()
    assert mine.keys() == back.keys()
    assert all(torch.equal(mine[name], back[name]) for name in mine)
    assert furthest(residuals(control, tiny_base), residuals(tiny_control, tiny_base)) == 0
    assert not control.training and not any(p.requires_grad for p in control.parameters())


def test_float16_is_the_default_and_close(saved, tiny_control, tiny_base):
    with safe_open(saved, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    control = load_control(saved, tiny_base)
    assert control.network.dtype == torch.float32
    assert 0 < furthest(residuals(control, tiny_base), residuals(tiny_control, tiny_base)) < 1e-2


def test_a_file_is_what_its_metadata_says_whatever_its_name(saved, tmp_path, tiny_control, tiny_base):
    renamed = saved.rename(tmp_path / "depth_final(2).bin")
    control = load_control(renamed, tiny_base)
    assert control.kind == "controlnet" and control.condition == "canny"
    assert furthest(residuals(control, tiny_base), residuals(tiny_control, tiny_base)) < 1e-2
    metadata = read_metadata(renamed)
    assert metadata["control.base_fingerprint"] == tiny_base.fingerprint
    assert json.loads(metadata["control.made"]) == {"steps": 7}


def test_a_control_without_a_condition_stays_without(tmp_path, tiny_base):
    path = save_control(tmp_path / "a.safetensors", fresh_control(tiny_base, None), tiny_base)
    assert load_control(path, tiny_base).condition is None


def test_diffusers_reads_what_we_write_and_we_read_what_diffusers_writes(tmp_path, tiny_control, tiny_base):
    tiny_control.to_diffusers().save_pretrained(tmp_path / "theirs")
    again = ControlNetModel.from_pretrained(tmp_path / "theirs")
    mine = tiny_control.file_state()
    assert all(torch.equal(mine[name], value) for name, value in again.state_dict().items())
    control = load_control(tmp_path / "theirs", tiny_base)
    assert furthest(residuals(control, tiny_base), residuals(tiny_control, tiny_base)) == 0


def test_a_failed_write_leaves_the_old_file(saved, tiny_control, tiny_base, monkeypatch):
    from controlkit.formats import metadata as layout

    before = saved.read_bytes()

    def fails(_tensors, path, _metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "save_file", fails)
    with pytest.raises(UserError, match="No space left"):
        save_control(saved, tiny_control, tiny_base)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_torn_files(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    not_loaded(saved, "damaged-file", saved, "0 bytes" if keep == 0 else "safetensors")


def test_what_is_no_file_of_tensors(tmp_path):
    (tmp_path / "control.safetensors").write_text("a note, by mistake")
    not_loaded(tmp_path / "control.safetensors", "damaged-file", tmp_path / "control.safetensors")


def test_tensors_of_something_else(tmp_path):
    save_file({"lora.up": torch.zeros(2)}, tmp_path / "a.safetensors")
    not_loaded(tmp_path / "a.safetensors", "wrong-kind", tmp_path / "a.safetensors", "a LoRA")
    save_file({}, tmp_path / "b.safetensors")
    not_loaded(tmp_path / "b.safetensors", "wrong-kind", tmp_path / "b.safetensors", "no tensors")


def rewrite(path, change_tensors=lambda tensors: None, **metadata):
    tensors, old = load_file(path), read_metadata(path)
    change_tensors(tensors)
    save_file(tensors, path, {key: value for key, value in {**old, **metadata}.items() if value is not None})


def test_a_kind_of_the_future(saved):
    rewrite(saved, **{"control.kind": "telepathy"})
    not_loaded(saved, "wrong-kind", saved, "telepathy")


@pytest.mark.parametrize("config", [None, "", "{", "[]", "3", '{"block_out_channels": [4]}', '{"in_channels": "x"}'])
def test_metadata_that_lies_about_the_network(saved, config):
    rewrite(saved, **{"control.config": config})
    not_loaded(saved, "damaged-file", saved, "controlnet")


def test_tensors_that_are_missing_too_many_or_of_another_shape(saved):
    whole = saved.read_bytes()
    for change in (
        lambda tensors: tensors.pop("conv_in.weight"),
        lambda tensors: tensors.update(extra=torch.zeros(2)),
        lambda tensors: tensors.update({"conv_in.weight": torch.zeros(3, 3)}),
    ):
        saved.write_bytes(whole)
        rewrite(saved, change)
        not_loaded(saved, "damaged-file", saved, "controlnet")


def test_a_control_of_another_base(saved):
    other = build_tiny_base(text_width=24)
    not_loaded(saved, "incompatible", saved, other.name, "text width", "16", "24", base=other)


@pytest.mark.parametrize(
    ("name", "facts"),
    [("cany", ("did you mean canny",)), ("zzzzz", ("canny, depth",)), ("runs/x.safetensors", ())],
)
def test_unknown_names_bring_the_nearest(monkeypatch, saved, name, facts):
    monkeypatch.setattr(files, "shipped_controls", lambda: {"canny": saved, "depth": saved})
    not_loaded(name, "missing-file", name, *facts)
    assert load_control("canny").condition == "canny"


def test_folders_that_are_not_a_controlnet(tmp_path, base_folder):
    not_loaded(tmp_path, "wrong-kind", tmp_path, "config.json")
    not_loaded(base_folder / "unet", "wrong-kind", "UNet2DConditionModel")
    config = base_folder / "unet" / "config.json"
    config.write_text("{")
    with pytest.raises(UserError, match=r"config.json .*JSON"):
        load_control(base_folder / "unet")
    config.write_text("[]")
    not_loaded(base_folder / "unet", "damaged-file", config)


def rebuilt(config, control):
    """The same weights under another config."""
    return ControlNet.from_checkpoint(
        Checkpoint(ControlNet.kind, config, control.file_state(), {"control.condition": "canny"})
    )


def test_a_network_for_blue_green_red_sees_what_it_sees_in_diffusers(tiny_base, tiny_control, condition_image):
    config = {**tiny_control.config(), "controlnet_conditioning_channel_order": "bgr"}
    control = rebuilt(config, tiny_control)
    image = to_tensor([condition_image]) * torch.tensor([1.0, 0.5, 0.1])[:, None, None]
    x_t, t, text = torch.randn(1, 4, 16, 16), torch.tensor([500]), tiny_base.encode_text(["red apple"])
    mine = control(x_t, t, text, control.encode(image, tiny_base))
    network = control.to_diffusers()
    assert network.config.controlnet_conditioning_channel_order == "bgr"
    with torch.no_grad():
        theirs = network(x_t, t, text.tokens, controlnet_cond=image, return_dict=False)
        turned = tiny_control(x_t, t, text, tiny_control.encode(image, tiny_base))
    assert torch.allclose(mine["middle"], theirs[1], atol=1e-5)
    assert not torch.allclose(mine["middle"], turned["middle"], atol=1e-3)
    assert control.config() == config


def test_a_network_that_pools_acts_on_the_half_with_the_prompt(tiny_base, tiny_control, condition_image):
    config = {**tiny_control.config(), "global_pool_conditions": True}
    control = rebuilt(config, tiny_control)
    use = ActiveControl(control, control.encode(to_tensor([condition_image]), tiny_base))
    assert use.conditional_only and not ActiveControl(tiny_control, use.hint).conditional_only
    texts = [tiny_base.encode_text([prompt]) for prompt in ("", "red apple")]
    made = Plan([use], torch.tensor([500]), texts).residuals(0, torch.randn(2, 4, 16, 16))
    assert made["skip.0"].shape[2:] == (1, 1)
    assert not made["middle"][0].any() and made["middle"][1].any()


def test_a_control_of_other_blocks_or_colours_is_refused_before_it_runs(tiny_base):
    config = fresh_control(tiny_base).config()
    for change, facts in (
        ({"layers_per_block": 2}, ("layers", "[2, 2]", "[1, 1]")),
        ({"conditioning_channels": 4}, ("4 channels", "3")),
    ):
        odd = ControlNet(ControlNetModel.from_config({**config, **change}))
        with refused("incompatible", "odd", tiny_base.name, *facts):
            files.check_fits(odd, tiny_base, "odd")


def test_files_get_the_weights_of_a_base_on_the_cpu(tiny_base):
    class OnAnotherDevice:
        def cpu(self):
            return "on the CPU"

    unet = SimpleNamespace(config=tiny_base.unet.config, state_dict=lambda: {"conv_in.weight": OnAnotherDevice()})

    class Elsewhere(type(tiny_base)):
        denoiser = unet

    assert files.reference_to(object.__new__(Elsewhere)).unet_weights == {"conv_in.weight": "on the CPU"}


def test_a_file_that_does_not_hold_what_it_announces_is_told_in_a_whole_sentence(saved):
    tensors, metadata = load_file(saved), read_metadata(saved)
    del tensors["conv_in.bias"]
    save_file(tensors, saved, metadata)
    with refused("damaged-file", saved, "controlnet", "1 of its"):
        load_control(saved)
