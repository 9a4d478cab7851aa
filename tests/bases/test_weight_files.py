"""Variants and shards: which files of a folder are a network's weights, and that bases and controls load from all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlkit.bases import folders
from controlkit.bases.load import load_base
from controlkit.bases.scaled_weights import unscaled
from controlkit.bases.weight_files import weight_files
from controlkit.formats.load import load_control
from controlkit.formats.tensors import read_tensor_file
from refusals import refused

STEM = "diffusion_pytorch_model"


def sharded(folder, stem, container, variant=None):
    """The weights of a folder in two shards and an index, in the place of the one file."""
    whole = folder / f"{stem}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    middle = f".{variant}" if variant else ""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"{stem if container == 'safetensors' else stem.replace('model', 'model')}{middle}-0000{number}-of-00002"
        name = f"{name}.{container}"
        chosen = {key: tensors[key] for key in part}
        if container == "safetensors":
            save_file(chosen, folder / name, {"format": "pt"})
        else:
            torch.save(chosen, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{container}.index{middle}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def drawn(base):
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return base.predict(x_t, torch.tensor([500]), base.encode_text(["red apple"]))


@pytest.mark.parametrize(("container", "variant"), [("safetensors", None), ("safetensors", "fp16"), ("bin", None)])
def test_a_base_of_shards_is_the_base(base_folder, tiny_base, container, variant):
    expected = drawn(load_base(base_folder))
    sharded(base_folder / "unet", STEM, container, variant)
    assert torch.equal(drawn(load_base(base_folder)), expected)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_base_of_halves_alone_is_read(base_folder, variant):
    expected = load_base(base_folder)
    for part, stem in (("unet", STEM), ("vae", STEM), ("text_encoder", "model")):
        path = base_folder / part / f"{stem}.safetensors"
        path.rename(path.with_name(f"{stem}.{variant}.safetensors"))
    made = load_base(base_folder)
    assert made.fingerprint == expected.fingerprint and torch.equal(drawn(made), drawn(expected))


def test_all_digits_come_before_halves_and_safetensors_before_files_of_torch(tmp_path):
    found = []
    for name in (f"{STEM}.fp16.bin", f"{STEM}.bin", f"{STEM}.bf16.safetensors", f"{STEM}.fp16.safetensors"):
        (tmp_path / name).touch()
        found.append(weight_files(tmp_path))
    (tmp_path / f"{STEM}.safetensors").touch()
    found.append(weight_files(tmp_path))
    assert [(one.variant, one.safetensors) for one in found] == [
        ("fp16", False),
        (None, False),
        ("bf16", True),
        ("fp16", True),
        (None, True),
    ]
    assert weight_files(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("index", "code", "fact"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "damaged-file", "../../etc/passwd"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing-file", "gone.safetensors"),
        ({"weight_map": {"a": ["x"]}}, "damaged-file", "['x']"),
        ({"weight_map": {"a": "x.safetensors", "b": 1}}, "damaged-file", "1"),
        ({"weight_map": {}}, "damaged-file", "weight_map"),
        ([1], "damaged-file", "weight_map"),
    ],
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(tmp_path, index, code, fact):
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    with refused(code, f"{STEM}.safetensors.index.json", fact):
        weight_files(tmp_path)


@pytest.mark.parametrize(("container", "variant"), [("bin", None), ("safetensors", "bf16"), ("bin", "fp16")])
def test_a_control_of_shards_is_the_control(tiny_control, tmp_path, container, variant):
    folder = tmp_path / "canny"
    tiny_control.to_diffusers().save_pretrained(folder)
    sharded(folder, STEM, container, variant)
    loaded = load_control(folder).state_dict()
    assert all(torch.equal(value, tiny_control.state_dict()[name]) for name, value in loaded.items())


def test_a_repository_of_halves_alone_is_fetched_with_them(base_folder, tmp_path, monkeypatch):
    """What the hub has is asked for twice: without halves, and with them where a part came without weights."""
    hub, kept = base_folder, tmp_path / "kept"
    (hub / "unet" / f"{STEM}.safetensors").rename(hub / "unet" / f"{STEM}.fp16.safetensors")
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns, **options):
        asked.append(ignore_patterns)
        for pattern in allow_patterns:
            for path in hub.glob(pattern):
                if not any(path.relative_to(hub).match(unwanted) for unwanted in ignore_patterns):
                    target = kept / path.relative_to(hub)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
        return str(kept)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert folders.from_hub("somebody/halves") == kept
    assert len(asked) == 2 and "*fp16*" in asked[0] and "*fp16*" not in asked[1]
    assert load_base(kept).fingerprint == load_base(hub).fingerprint


def test_weights_in_float8_with_scales_are_scaled(tmp_path):
    weight = torch.randn(4, 4)
    scale = weight.abs().max() / 448
    tensors = {
        "layer.weight": (weight / scale).to(torch.float8_e4m3fn),
        "layer.scale_weight": scale,
        "layer.scale_input": torch.tensor(1.0),
        "layer.bias": torch.ones(4, dtype=torch.float16),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_tensor_file(tmp_path / "a.safetensors").tensors
    assert set(read) == {"layer.weight", "layer.bias"} and read["layer.bias"].dtype == torch.float16
    assert (read["layer.weight"] - weight).abs().max() < 0.07 * weight.abs().max()


def named_format(name):
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


def test_newer_files_name_their_format(tmp_path):
    weight, scale = torch.randn(4, 4), torch.tensor(0.01)
    tensors = {
        "layer.weight": (weight / scale).to(torch.float8_e4m3fn),
        "layer.weight_scale": scale,
        "layer.input_scale": torch.tensor(1.0),
        "layer.comfy_quant": named_format("float8_e4m3fn"),
        "other.weight": torch.ones(2, 2),
    }
    made = unscaled(tensors, torch.bfloat16)
    assert set(made) == {"layer.weight", "other.weight"} and made["layer.weight"].dtype == torch.bfloat16
    assert (made["layer.weight"] - weight).abs().max() < 0.07 * weight.abs().max()
    assert made["other.weight"].dtype == torch.float32
    with refused("unsupported", "layer", "nvfp4", "float8_e4m3fn"):
        unscaled({**tensors, "layer.comfy_quant": named_format("nvfp4")})
    with refused("unsupported", "layer.weight", "uint8"):
        unscaled({"layer.weight": torch.ones(4, 4, dtype=torch.uint8), "layer.weight_scale": scale})
    with refused("unsupported", "layer", "unknown"):
        unscaled({**tensors, "layer.comfy_quant": torch.zeros(3, dtype=torch.uint8)})


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1,), ()])
def test_scales_of_float8_are_of_a_weight_or_of_its_rows(shape):
    weight, scale = torch.randn(6, 6), torch.rand(shape) + 0.5
    made = unscaled({"layer.weight": weight, "layer.scale_weight": scale})
    expected = weight * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    torch.testing.assert_close(made, {"layer.weight": expected})


def test_scales_that_fit_no_weight_are_refused_or_stay_for_strict_loading():
    for shape in ((4,), (1, 6), (6, 6)):
        with refused("damaged-file", "layer.weight", shape):
            unscaled({"layer.weight": torch.ones(6, 6), "layer.scale_weight": torch.ones(shape)})
    of_none = {"other.scale_weight": torch.ones(1), "other.scale_input": torch.ones(1)}
    assert set(unscaled({"layer.weight": torch.ones(2, 2), **of_none})) == {"layer.weight", *of_none}
