"""Offset transfer: what is shifted, what stays, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from controlkit.apps.cli import main
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.formats.convert import convert
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.nano.base_objective import save_base
from refusals import check, refused
from tiny import build_tiny_base, fresh_control, randomise_zero_convolutions


@pytest.fixture(scope="module")
def other():
    return build_tiny_base(seed=7)


def test_an_untrained_control_becomes_the_other_bases_untrained_control(tiny_base, other):
    control = fresh_control(tiny_base)
    made, offset = transfer(control, tiny_base, other)
    unet = other.unet.state_dict()
    shifted = [name for name in made.network.state_dict() if name in unet]
    assert len(shifted) == offset.moved > 0 and offset.distance > 0
    for name in shifted:
        assert torch.allclose(made.network.state_dict()[name], unet[name], atol=1e-6), name
    for name, value in made.hint_network.state_dict().items():
        assert torch.equal(value, control.hint_network.state_dict()[name])


def test_to_the_same_base_nothing_changes(tiny_base, tiny_control):
    made, offset = transfer(tiny_control, tiny_base, tiny_base)
    assert offset.distance == 0
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), tiny_control.parameters(), strict=True))
    assert made is not tiny_control


def test_there_and_back_again(tiny_base, other, tiny_control):
    there, _ = transfer(tiny_control, tiny_base, other)
    back, _ = transfer(there, other, tiny_base)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(back.parameters(), tiny_control.parameters(), strict=True)
    )


def test_a_base_control_moves_too_and_its_zero_convolutions_stay(tiny_base, other):
    control = BaseControlNet.for_base(tiny_base)
    with torch.no_grad():
        control.network.controlnet_mid_block.weight.fill_(0.5)
    made, offset = transfer(control, tiny_base, other)
    assert offset.kept == sum(name.startswith("controlnet_") for name in control.network.state_dict())
    assert torch.equal(made.network.controlnet_mid_block.weight, control.network.controlnet_mid_block.weight)
    assert torch.allclose(made.network.conv_in.weight, other.unet.conv_in.weight, atol=1e-6)


def test_bases_of_another_shape_are_refused(tiny_base, tiny_control):
    with refused("incompatible", "the control", tiny_base.name):
        transfer(tiny_control, tiny_base, build_tiny_base(text_width=32))


def test_the_verb_writes_a_control_of_the_other_base(tiny_base, other, base_folder, tmp_path, capsys):
    save_base(other, tmp_path / "other")
    control = randomise_zero_convolutions(fresh_control(tiny_base))
    save_control(tmp_path / "canny.safetensors", control, tiny_base)
    command = [
        "transfer",
        str(tmp_path / "canny.safetensors"),
        "--from",
        str(base_folder),
        "--to",
        str(tmp_path / "other"),
    ]
    assert main([*command, "--out", str(tmp_path / "moved.safetensors"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["moved"] > 0 and "unchanged" in told["limits"]
    assert load_control(tmp_path / "moved.safetensors", other).condition == "canny"
    assert main([*command, "--out", str(tmp_path / "moved.safetensors")]) == 2
    check(capsys.readouterr().err, "would-overwrite", tmp_path / "moved.safetensors", "--force")
    assert main([*command, "--out", str(tmp_path / "canny.safetensors"), "--force"]) == 2
    check(capsys.readouterr().err, "would-overwrite", tmp_path / "canny.safetensors", "--out")
    assert load_control(tmp_path / "canny.safetensors", tiny_base).condition == "canny"
    assert main([*command, "--out", str(tmp_path / "moved.pt")]) == 2
    assert ".safetensors" in capsys.readouterr().err


def test_a_control_of_another_base_is_not_moved_from_this_one(tiny_base, other, base_folder, tmp_path, capsys):
    save_base(other, tmp_path / "other")
    save_control(tmp_path / "canny.safetensors", fresh_control(tiny_base), tiny_base)
    swapped = ["--from", str(tmp_path / "other"), "--to", str(base_folder)]
    out = tmp_path / "moved.safetensors"
    assert main(["transfer", str(tmp_path / "canny.safetensors"), *swapped, "--out", str(out)]) == 2
    assert f"was trained on the base tiny ({tiny_base.fingerprint})" in capsys.readouterr().err
    assert not out.exists()


def test_adapters_go_along_with_their_base_control(tiny_base, other, base_folder, tmp_path, capsys):
    save_base(other, tmp_path / "other")
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("palette", 2, seed=0)
    base = save_control(tmp_path / "base.safetensors", shared, tiny_base)
    adapter = save_control(
        tmp_path / "palette.safetensors", CtrLoRA(shared, "palette", "palette"), tiny_base, companion="base"
    )
    there, back = tmp_path / "there.safetensors", tmp_path / "elsewhere" / "back.safetensors"
    bases = [str(base_folder), str(tmp_path / "other")]
    assert main(["transfer", str(base), "--from", bases[0], "--to", bases[1], "--out", str(there)]) == 0
    assert main(["transfer", str(there), "--from", bases[1], "--to", bases[0], "--out", str(back)]) == 0
    old, new = (read_metadata(path)["control.fingerprint"] for path in (base, there))
    assert old != new and read_metadata(there)["control.transferred_from"] == old
    assert read_metadata(back)["control.transferred_from"] == f"{old},{new}"

    held: dict = {}
    mine = load_control(adapter, tiny_base, shared=held)
    moved = load_control(f"{adapter}+{there}", other, shared=held)
    assert (mine.base_control.fingerprint(), moved.base_control.fingerprint()) == (old, new) == tuple(held)
    assert load_control(f"{adapter}+{back}", tiny_base).base_control.transferred_from == (old, new)
    base.rename(tmp_path / "elsewhere" / "base.safetensors")
    assert load_control(adapter, other).base_control.fingerprint() == new

    # An adapter that is baked in is part of what it was made for no longer.
    merged = convert(adapter, tmp_path / "merged.safetensors", "merged", base_control=there).path
    assert "control.transferred_from" not in read_metadata(merged)
    stranger = BaseControlNet.for_base(other)
    stranger.network.conv_in.weight.data.add_(1)
    save_control(tmp_path / "stranger.safetensors", stranger, other)
    with refused("incompatible", adapter, "base control", old, tmp_path / "stranger.safetensors"):
        load_control(f"{adapter}+{tmp_path / 'stranger.safetensors'}", other)
