"""Offset transfer: what is shifted, what stays, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.controls.apply import predict_under
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.images import to_tensor
from controlkit.nano.base_objective import save_base
from refusals import check, refused
from tiny import any_hint, build_tiny_base, fresh_control, randomise_zero_convolutions

SYSTEMS = tiny.unet_systems()
OPTIONS = {"controlnet-xs": {"size_ratio": 0.5}}  # the tiny base divides no smaller


def variants(name, base):
    """Fresh controls of a system for `base`, whose random weights are the same for every base."""
    kind = SYSTEMS[name]
    torch.manual_seed(3)
    options = OPTIONS.get(name, {})
    made = {"": kind.for_base(base, **options)} if kind.companion is not None else kind.variants(base, **options)
    return {variant: control.eval().requires_grad_(False) for variant, control in made.items()}


def trained(control):
    """The control with other weights."""
    torch.manual_seed(4)
    for parameter in control.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)
    return control


def saved(control, base, folder):
    """The file of a control, with its companion's beside it."""
    companion = control.shared_network
    if control.companion is not None:
        save_control(folder / "companion.safetensors", companion, base, dtype=torch.float32)
    name = "companion" if control.companion is not None else None
    return save_control(folder / "control.safetensors", control, base, companion=name, dtype=torch.float32)


@pytest.fixture(scope="module")
def other():
    return build_tiny_base(seed=7)


@pytest.mark.parametrize("layout", ["difference", "control-lora"])
def test_a_difference_added_to_another_base_records_that_base(tiny_base, other, layout, tmp_path):
    for base, name in ((tiny_base, "a"), (other, "b")):
        save_base(base, tmp_path / name)
    control = randomise_zero_convolutions(fresh_control(load_base(tmp_path / "a")))
    file = save_control(tmp_path / "c.safetensors", control, load_base(tmp_path / "a"), dtype=torch.float32)
    rank = {"rank": 2} if layout == "control-lora" else {}
    convert(file, tmp_path / "d.safetensors", layout, base=str(tmp_path / "a"), **rank)
    same = convert(tmp_path / "d.safetensors", tmp_path / "same.safetensors", "controlkit", base=str(tmp_path / "a"))
    assert read_metadata(same.path) == read_metadata(file)
    assert not any("offset" in note for note in same.notes)
    moved = convert(tmp_path / "d.safetensors", tmp_path / "m.safetensors", "controlkit", base=str(tmp_path / "b"))
    found = load_base(tmp_path / "b")
    recorded = read_metadata(moved.path)
    assert (recorded["control.base"], recorded["control.base_fingerprint"]) == (found.name, found.fingerprint)
    assert any("offset" in note and str(tmp_path / "b") in note for note in moved.notes)
    # Moved once, it is not moved again.
    command = ["transfer", str(moved.path), "--from", str(tmp_path / "a"), "--to", str(tmp_path / "b")]
    assert main([*command, "--out", str(tmp_path / "twice.safetensors")]) == 2


@pytest.mark.parametrize("layout", ["difference", "control-lora"])
def test_a_difference_from_another_base_than_the_controls_own_comes_back_with_that_base(
    tiny_base, other, layout, tmp_path
):
    for base, name in ((tiny_base, "a"), (other, "b")):
        save_base(base, tmp_path / name)
    control = randomise_zero_convolutions(fresh_control(load_base(tmp_path / "a")))
    file = save_control(tmp_path / "c.safetensors", control, load_base(tmp_path / "a"), dtype=torch.float32)
    rank = {"rank": 64} if layout == "control-lora" else {}
    difference = convert(file, tmp_path / "d.safetensors", layout, base=str(tmp_path / "b"), **rank).path
    assert read_metadata(difference)["control.base"] == read_metadata(file)["control.base"]
    back = convert(difference, tmp_path / "back.safetensors", "controlkit", base=str(tmp_path / "b"))
    assert read_metadata(back.path) == read_metadata(file)
    assert not any("offset" in note for note in back.notes)
    for name, value in load_file(file).items():
        assert torch.allclose(load_file(back.path)[name], value, atol=1e-5), name
    moved = convert(difference, tmp_path / "moved.safetensors", "controlkit", base=str(tmp_path / "a"))
    assert any("offset" in note and str(tmp_path / "b") in note and other.fingerprint in note for note in moved.notes)
    command = ["transfer", str(back.path), "--from", str(tmp_path / "a"), "--to", str(tmp_path / "b")]
    assert main([*command, "--out", str(tmp_path / "there.safetensors")]) == 0


def test_an_untrained_control_becomes_the_other_bases_untrained_control(tiny_base, other):
    control = fresh_control(tiny_base)
    made, offset = transfer(control, tiny_base, other)
    unet = other.unet.state_dict()
    shifted = [name for name in made.network.state_dict() if name in unet]
    assert len(shifted) == offset.moved > 0 and offset.distance > 0
    assert offset.moved + offset.kept == len(control.file_state())
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
    assert offset.kept == sum(name.startswith("controlnet_") for name in control.file_state())
    assert offset.moved + offset.kept == len(control.file_state())
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_transferred_file_keeps_its_dtype_and_what_others_wrote_into_it(
    tiny_base, other, base_folder, tmp_path, dtype
):
    save_base(other, tmp_path / "other")
    theirs = {"modelspec.author": "somebody", "modelspec.license": "openrail", "ss_note": "mine"}
    file = save_control(tmp_path / "a.safetensors", fresh_control(tiny_base), tiny_base, dtype=dtype)
    outdated = {"modelspec.hash_sha256": "0x00", "modelspec.title": "a", "control.own": "old"}
    save_file(load_file(file), file, {**read_metadata(file), **theirs, **outdated})
    out = tmp_path / "moved.safetensors"
    words = ["transfer", str(file), "--from", str(base_folder), "--to", str(tmp_path / "other"), "--out", str(out)]
    assert main(words) == 0
    assert {value.dtype for value in load_file(out).values()} == {dtype}
    metadata = read_metadata(out)
    assert theirs.items() <= metadata.items()
    assert metadata["modelspec.title"] == "moved" and metadata["control.base_fingerprint"] == other.fingerprint
    assert not {"modelspec.hash_sha256", "control.own"} & metadata.keys()


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
    # It contains the transferred base control, and so a copy of the other base.
    for key in ("control.base", "control.base_fingerprint"):
        assert read_metadata(merged)[key] == read_metadata(there)[key] != read_metadata(adapter)[key]
    stranger = BaseControlNet.for_base(other)
    stranger.network.conv_in.weight.data.add_(1)
    save_control(tmp_path / "stranger.safetensors", stranger, other)
    with refused("incompatible", adapter, "base control", old, tmp_path / "stranger.safetensors"):
        load_control(f"{adapter}+{tmp_path / 'stranger.safetensors'}", other)
    with refused("incompatible", adapter, "base control", old, tmp_path / "stranger.safetensors"):
        describe(f"{adapter}+{tmp_path / 'stranger.safetensors'}")
    assert describe(f"{adapter}+{there}") == describe(str(adapter))
    for use in (load_control, describe):
        with refused("contradiction", there, "no base control"):
            use(f"{there}+{adapter}")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_acts_on_another_base_of_the_family_as_it_is(name, tiny_base, other, tmp_path, condition_image):
    path = saved(trained(variants(name, tiny_base)[""]), tiny_base, tmp_path)
    control = load_control(path, other)
    if len(control.conditions) > 1:
        control = control.for_condition(control.conditions[0])
    images, inputs = to_tensor([condition_image]), (torch.randn(1, 4, 16, 16), torch.tensor([500]))
    text = other.encode_text(["red apple"])
    with torch.no_grad():
        made = predict_under(control, other, *inputs, text, any_hint(control, images, other))
        assert made.isfinite().all()
        assert (made - other.predict(*inputs, text)).abs().max() > 1e-4
    with refused("incompatible", path, "nano"):
        load_control(path, load_base("nano"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_transferred_by_offset_or_refused_in_words(
    name, tiny_base, other, base_folder, tmp_path, capsys
):
    """The offset is that of a new control for the other base from a new one for its own, on every tensor."""
    fresh, elsewhere = variants(name, tiny_base), variants(name, other)
    if fresh[""].copied_network() is None:
        with refused("unsupported", SYSTEMS[name].title, "as it is"):
            transfer(fresh[""], tiny_base, other)
        save_base(other, tmp_path / "other")
        path = saved(fresh[""], tiny_base, tmp_path)
        bases = ["--from", str(base_folder), "--to", str(tmp_path / "other")]
        assert main(["transfer", str(path), *bases, "--out", str(tmp_path / "out.safetensors")]) == 2
        instead = "base control" if SYSTEMS[name].companion is not None else "unchanged"
        check(capsys.readouterr().err, "wrong-kind", path, name, instead)
        return
    for variant, control in fresh.items():
        before = {key: value.clone() for key, value in control.file_state().items()}
        offset = {key: value - before[key] for key, value in elsewhere[variant].file_state().items()}
        assert any(change.abs().max() > 1e-3 for change in offset.values())
        known = {key: value.clone() for key, value in trained(control).file_state().items()}
        made, _ = transfer(control, tiny_base, other)
        for key, value in made.file_state().items():
            assert torch.allclose(value, known[key] + offset[key], atol=1e-5), (variant, key)
        assert all(torch.equal(value, known[key]) for key, value in control.file_state().items())
