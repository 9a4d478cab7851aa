"""The verb `convert`: files between layouts, and what it says to bad input."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from controlkit import conditions, progress
from controlkit.apps.cli import main
from controlkit.conditions.condition import is_of_labels
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.gligen import GLIGEN
from controlkit.controls.uni_controlnet import LocalAdapter
from controlkit.controls.unicontrol import UniControl
from controlkit.formats.load import load_control, save_control, shipped_controls
from controlkit.formats.metadata import read_metadata
from refusals import check


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


def test_the_decomposition_of_a_control_lora_shows_progress(file, base_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SILENT", 0)
    words = ("convert", file, tmp_path / "lora.safetensors", "--to", "control-lora", "--base", base_folder, "--rank", 2)
    assert run(*words) == 0
    assert "layers" not in capsys.readouterr().err
    assert run(*words, "--force", "--verbose") == 0
    assert re.search(r"(\d+) of \1 layers$", capsys.readouterr().err, re.MULTILINE)


def test_a_control_that_ships_is_found_by_its_name(tmp_path, capsys):
    assert run("convert", "canny", tmp_path / "canny.safetensors", "--to", "original") == 0
    assert run("inspect", tmp_path / "canny.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layout"] == "original"


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (("IN", "out.safetensors", "--to", "orignal"), "unknown-name", ["'orignal'", "did you mean original"]),
        (("IN", "out.pth", "--to", "original"), "unsupported", ["out.pth", ".safetensors"]),
        (
            ("IN", "out.safetensors", "--to", "original", "--dtype", "fp8"),
            "unknown-name",
            ["--dtype", "fp8", "float32"],
        ),
        (("IN", "out.safetensors", "--to", "peft"), "unsupported", ["peft"]),
        (("IN", "out.safetensors", "--to", "merged"), "unsupported", ["merged"]),
        (("IN", "out.safetensors", "--to", "difference"), "missing-setting", ["--base"]),
        (
            ("IN", "out.safetensors", "--to", "control-lora", "--base", "nano", "--rank", "0"),
            "out-of-range",
            ["--rank 0"],
        ),
        (("IN", "out.safetensors", "--to", "difference", "--base", "nano"), "incompatible", ["base"]),
        (("IN", "out.safetensors", "--to", "original", "--base", "nowhere"), "missing-file", ["nowhere", "base"]),
        (("IN", "out.safetensors", "--to", "full"), "unsupported", ["full"]),
        (("IN", "IN", "--to", "diffusers"), "wrong-kind", ["canny.safetensors", "diffusers"]),
        (("nothing.pth", "out.safetensors", "--to", "original"), "missing-file", ["'nothing.pth'"]),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(file, tmp_path, monkeypatch, capsys, words, code, facts):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run("convert", *(file if word == "IN" else word for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("controlkit: ") and err.count("\n") == 1
    check(err, code, *facts)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_control_in_another_type_says_its_own_fingerprint(tiny_base, tmp_path):
    shared = BaseControlNet.for_base(tiny_base)
    file = save_control(tmp_path / "base.safetensors", shared, tiny_base, dtype=torch.float32)
    out = tmp_path / "half.safetensors"
    assert run("convert", file, out, "--to", "controlkit", "--dtype", "bfloat16") == 0
    said = read_metadata(out)["control.fingerprint"]
    assert said == load_control(out, tiny_base).fingerprint() != read_metadata(file)["control.fingerprint"]


@pytest.mark.parametrize("recorded", [True, False])
def test_adapters_of_a_base_control_load_with_it_in_another_type(tiny_base, base_folder, tmp_path, recorded):
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("palette", 2, seed=0)
    base, out = tmp_path / "base.safetensors", tmp_path / "cast" / "base.safetensors"
    save_control(base, shared, tiny_base, dtype=torch.float32)
    control = CtrLoRA(shared, "palette", "palette")
    adapter = save_control(tmp_path / "cast" / "palette.safetensors", control, tiny_base, companion="base")
    if not recorded:
        save_file({name: value.clone() for name, value in load_file(base).items()}, base)
    assert run("convert", base, out, "--to", "controlkit", "--dtype", "bfloat16", "--base", base_folder) == 0
    assert load_control(adapter, tiny_base).shared_network.fingerprint() == read_metadata(out)["control.fingerprint"]
    assert load_control(f"{adapter}+{out}", tiny_base)


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (["--to", "controlkit", "--condition", "cany"], "unknown-name", ["'cany'", "did you mean canny"]),
        (["--to", "diffusers", "--rank", "4"], "contradiction", ["--rank 4", "--to control-lora"]),
        (["--to", "controlkit", "--base-control", "nano/base"], "contradiction", ["--base-control", "CtrLoRA"]),
    ],
)
def test_options_that_would_do_nothing_are_refused(file, tmp_path, capsys, words, code, facts):
    assert run("convert", file, tmp_path / "new.safetensors", *words) == 2
    check(capsys.readouterr().err, code, *facts)
    assert run("convert", file, file, "--to", "original") == 2
    assert "[would-overwrite]" in capsys.readouterr().err


def test_a_base_that_does_not_fit_is_refused_even_where_nothing_needs_it(file, tmp_path, capsys):
    assert run("convert", file, tmp_path / "new.safetensors", "--to", "original", "--base", "sdxl") == 2
    check(capsys.readouterr().err, "incompatible", file, "sdxl", "--base")
    assert not (tmp_path / "new.safetensors").exists()


def test_only_conditions_that_a_control_has_are_recorded(tiny_base, tmp_path, capsys):
    unicontrol = UniControl.for_base(tiny_base, tasks={"canny": "canny to image", "grayscale": "grayscale to image"})
    local = LocalAdapter.for_base(tiny_base, names=["canny", "palette"])
    gligen = tmp_path / "gligen.safetensors"
    save_control(gligen, GLIGEN.for_base(tiny_base), tiny_base)
    of_tasks = save_control(tmp_path / "unicontrol.safetensors", unicontrol, tiny_base)
    of_images = save_control(tmp_path / "local.safetensors", local, tiny_base)
    out = tmp_path / "new.safetensors"
    for path, condition, code, facts in (
        (of_tasks, "depth", "unknown-name", ["depth", "canny", "grayscale"]),
        (of_images, "depth", "contradiction", ["depth", "canny (image", "palette (image"]),
        (of_images, "canny", "contradiction", ["canny (image", "palette (image"]),
        (gligen, "canny", "contradiction", ["boxes (value)"]),
    ):
        assert run("convert", path, out, "--to", "controlkit", "--condition", condition) == 2
        check(capsys.readouterr().err, code, path, *facts)
        assert not out.exists()
    assert run("convert", of_tasks, out, "--to", "controlkit", "--condition", "grayscale") == 0
    assert load_control(out, tiny_base).conditions == ("grayscale",)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("named", [True, False])
def test_a_base_control_is_not_written_over_by_what_is_made_of_it(tiny_base, tmp_path, capsys, force, named):
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("palette", 2, seed=0)
    base = save_control(tmp_path / "base.safetensors", shared, tiny_base)
    adapter = save_control(
        tmp_path / "palette.safetensors",
        CtrLoRA(shared, "palette", "palette"),
        tiny_base,
        companion="base",
        dtype=torch.float32,
    )
    before = contents(tmp_path)
    words = ["--base-control", base] if named else []
    assert run("convert", adapter, base, "--to", "merged", *words, *force) == 2
    check(capsys.readouterr().err, "would-overwrite", base)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_weights_of_a_folder_are_not_written_over_by_themselves(file, tmp_path, capsys, force):
    assert run("convert", file, tmp_path / "cn", "--to", "diffusers") == 0
    before = contents(tmp_path)
    weights = tmp_path / "cn" / "diffusion_pytorch_model.safetensors"
    assert run("convert", weights, tmp_path / "cn", "--to", "diffusers", "--dtype", "float16", *force) == 2
    said = capsys.readouterr().err
    check(said, "would-overwrite", weights)
    assert "--out" not in said
    assert contents(tmp_path) == before


def test_metadata_of_the_tensors_is_dropped_and_all_other_kept(file, tmp_path):
    metadata = {**read_metadata(file), "modelspec.hash_sha256": "0x1", "modelspec.author": "somebody"}
    save_file({name: value.clone() for name, value in load_file(file).items()}, file, metadata)
    out = tmp_path / "half.safetensors"
    assert run("convert", file, out, "--to", "controlkit", "--dtype", "float16") == 0
    kept = read_metadata(out)
    assert kept["modelspec.author"] == "somebody" and "modelspec.hash_sha256" not in kept


def test_metadata_of_a_sharded_folder_is_kept(file, tmp_path):
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert run("convert", file, folder, "--to", "diffusers") == 0
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors, metadata = load_file(weights), read_metadata(weights)
    parts = {f"diffusion_pytorch_model-0000{place + 1}-of-00002.safetensors": place for place in (0, 1)}
    weight_map = {}
    for name, place in parts.items():
        part = {key: tensors[key] for key in sorted(tensors)[place::2]}
        save_file(part, folder / name, metadata)
        weight_map |= dict.fromkeys(part, name)
    weights.unlink()
    (folder / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run("convert", folder, back, "--to", "controlkit") == 0
    assert read_metadata(back)["control.condition"] == read_metadata(file)["control.condition"] == "canny"
    assert read_metadata(back)["control.base"] == read_metadata(file)["control.base"]


def test_a_merged_adapter_is_of_the_architecture_of_its_base_control(tmp_path):
    out = tmp_path / "merged.safetensors"
    assert run("convert", "nano/palette", out, "--to", "merged") == 0
    base = shipped_controls()["nano/base"]
    assert read_metadata(out)["modelspec.architecture"] == read_metadata(base)["modelspec.architecture"]


def test_a_base_is_not_written_over(file, base_folder, tmp_path, capsys):
    before = contents(base_folder)
    words = ("--to", "diffusers", "--base", base_folder, "--force")
    assert run("convert", file, base_folder / "unet", *words) == 2
    check(capsys.readouterr().err, "would-overwrite", base_folder / "unet")
    assert contents(base_folder) == before


def test_what_is_there_is_replaced_only_if_that_is_asked_for(file, tmp_path, capsys):
    out, folder = tmp_path / "out.safetensors", tmp_path / "cn"
    out.write_text("mine")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    assert run("convert", file, out, "--to", "original") == 2
    said = capsys.readouterr().err
    check(said, "would-overwrite", out, "--force")
    assert "--out" not in said  # which `convert` does not have
    assert run("convert", file, folder, "--to", "diffusers") == 2
    assert "[would-overwrite]" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run("convert", file, out, "--to", "original", "--force") == 0
    assert run("convert", file, folder, "--to", "diffusers", "--force") == 0
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_folder_of_another_format_is_refused_as_readers_prefer_its_files(file, tiny_base, tmp_path, capsys):
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("palette", 2, seed=0)
    save_control(tmp_path / "base.safetensors", shared, tiny_base)
    adapter = CtrLoRA(shared, "palette", "palette")
    path = save_control(tmp_path / "palette.safetensors", adapter, tiny_base, companion="base")
    folder = tmp_path / "folder"
    assert run("convert", path, folder, "--to", "peft") == 0
    before = contents(folder)
    assert run("convert", file, folder, "--to", "diffusers", "--force") == 2
    check(capsys.readouterr().err, "would-overwrite", folder, "adapter_config.json", "adapter_model.safetensors")
    assert contents(folder) == before
    assert run("convert", path, folder, "--to", "peft", "--force") == 0  # the same format replaces its own files


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"variant": "fp16"}])
def test_weights_that_diffusers_would_load_instead_are_refused(file, tiny_base, tmp_path, capsys, options):
    folder, new = tmp_path / "folder", tmp_path / "new.safetensors"
    assert run("convert", file, folder, "--to", "diffusers") == 0
    old = ControlNetModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    old.save_pretrained(folder, **options)
    stale = sorted(path.name for path in folder.iterdir() if path.name != "config.json")
    tensors = {name: value + 1 for name, value in load_file(file).items()}
    save_file(tensors, new, read_metadata(file))
    assert run("convert", new, folder, "--to", "diffusers", "--force") == 2
    check(capsys.readouterr().err, "would-overwrite", folder, stale[0])
    assert not (folder / "diffusion_pytorch_model.safetensors").exists()
    for name in stale:
        (folder / name).unlink()
    assert run("convert", new, folder, "--to", "diffusers", "--force") == 0
    loaded = ControlNetModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_weights_beyond_a_type_s_range_are_refused_and_those_below_it_noted(file, tmp_path, capsys):
    tensors = {name: value.clone() for name, value in load_file(file).items()}  # as it is written over
    metadata, large, small = read_metadata(file), "conv_in.weight", "conv_in.bias"
    tensors[small] = torch.full_like(tensors[small], 1e-9)
    save_file(tensors, file, metadata)
    out = tmp_path / "half.safetensors"
    words = ("convert", file, out, "--to", "controlkit", "--dtype")
    assert run(*words, "float16", "--json") == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert small in note and "float16" in note
    assert run(*words, "bfloat16", "--force", "--json") == 0
    assert not json.loads(capsys.readouterr().out)["notes"]
    out.unlink()
    tensors[large][0] = 1e5
    save_file(tensors, file, metadata)
    assert run(*words, "float16") == 2
    check(capsys.readouterr().err, "out-of-range", file, large, "float16", "65504")
    assert not out.exists()
    assert run(*words, "bfloat16") == 0


@pytest.mark.parametrize(
    ("to", "settings"),
    [
        ("diffusers", {"only_mid_control": True}),
        ("original", {"only_mid_control": True, "global_average_pooling": True}),
        ("bare", {"channel_order": "bgr"}),
    ],
)
def test_settings_without_a_place_in_a_format_are_noted_and_come_back(tiny_base, tmp_path, capsys, to, settings):
    order = settings.pop("channel_order", "rgb")
    control = ControlNet.for_base(tiny_base, **settings)
    control.channel_order = order
    file = save_control(tmp_path / "control.safetensors", control, tiny_base)
    out = tmp_path / ("folder" if to == "diffusers" else "out.safetensors")
    assert run("convert", file, out, "--to", to, "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    names = [*settings, *(["BGR"] if order == "bgr" else [])]
    assert len(notes) == len(names) and all(any(name in note for note in notes) for name in names)
    assert run("convert", out, tmp_path / "again.safetensors", "--to", "controlkit") == 0
    again = load_control(tmp_path / "again.safetensors", tiny_base).config()
    assert json.dumps(again, sort_keys=True) == json.dumps(control.config(), sort_keys=True)


def test_notes_are_on_standard_error_and_not_printed_with_quiet(tiny_base, tmp_path, capsys):
    control = ControlNet.for_base(tiny_base, only_mid_control=True)
    file, out = save_control(tmp_path / "control.safetensors", control, tiny_base), tmp_path / "out.safetensors"
    assert run("convert", file, out, "--to", "original") == 0
    printed = capsys.readouterr()
    assert "note: " in printed.err and "note: " not in printed.out
    assert run("convert", file, out, "--to", "original", "--force", "--quiet") == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (printed.out, "")


def test_a_condition_s_other_name_is_stored_as_its_own(file, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run("convert", file, out, "--to", "original", "--condition", "segmentation") == 0
    assert read_metadata(out)["control.condition"] == conditions.find("segmentation").name != "segmentation"


def test_labels_are_not_mixed_whatever_name_a_file_gives_to_its_condition(tiny_control):
    control = copy.copy(tiny_control)
    for name, labels in (("segmentation", True), ("canny", False), ("somebody's own", False), (None, False)):
        control.condition = name
        assert is_of_labels(control.condition) == labels


def test_a_shuffle_whose_file_says_nothing_pools(file, tmp_path, tiny_base, base_folder, capsys):
    plain, bare = tmp_path / "plain.safetensors", tmp_path / "control.pth"
    assert run("convert", file, plain, "--to", "original") == 0
    torch.save(load_file(plain), bare)
    for number, (words, pools) in enumerate(
        ((["--condition", "shuffle"], True), (["--condition", "canny"], False), (["--pooled"], True))
    ):
        out = tmp_path / f"{number}.safetensors"
        assert run("convert", bare, out, "--to", "original", "--base", base_folder, *words) == 0
        assert load_control(out, tiny_base).conditional_only == pools
        assert run("convert", out, tmp_path / str(number), "--to", "diffusers") == 0
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config.get("global_pool_conditions", False) == pools
    assert "pooled residuals" in capsys.readouterr().err
    # A file that says that it does not pool is believed.
    assert run("convert", plain, tmp_path / "ours.safetensors", "--to", "controlkit", "--condition", "shuffle") == 0
    assert not load_control(tmp_path / "ours.safetensors", tiny_base).conditional_only


def test_what_cannot_pool_is_refused(tiny_base, tmp_path, capsys):
    base = save_control(tmp_path / "base.safetensors", BaseControlNet.for_base(tiny_base), tiny_base)
    assert run("convert", base, tmp_path / "out.safetensors", "--to", "original", "--pooled") == 2
    check(capsys.readouterr().err, "contradiction", "--pooled", "ControlNet")
