"""What a file is said to be: by what is in it, never by its name; and what is refused, in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from layout_files import trained_pair, weights_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlkit.controls.controlnet import ControlNet
from controlkit.controls.file_format import TensorFile
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.detect import detect
from controlkit.formats.load import load_control, save_control
from refusals import refused


def not_read(path, code, *facts):
    """Loading, inspecting and converting fail with one error; but an undamaged file that is not a control can be
    inspected, with the same description."""
    errors = {}
    for read in (load_control, describe, lambda p: convert(p, path.parent / "o.safetensors", "controlkit")):
        if read is describe and code == "wrong-kind" and "appears to be" in str(errors):
            facts_of_file = describe(str(path))
            assert facts_of_file["kind"].startswith("none") and all(facts_of_file["what"] in text for text in errors)
            continue
        with refused(code, path, *facts) as caught:
            read(str(path))
        errors[str(caught.value)] = code
    (message,) = errors
    assert "\n" not in message
    assert not (path.parent / "o.safetensors").exists()


FOREIGN = {
    "LoHa": ["lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a", "lora_unet_mid_block.hada_w2_b"],
    "LoRA for the UNet": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "lora_te_x.alpha"],
    "LoRA for the UNet.": ["unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight"],
    "LoRA for a diffusion transformer": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "a full Stable Diffusion checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.output_blocks.0.0.in_layers.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
    "a full Stable Diffusion XL checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    ],
    "a Stable Diffusion UNet": ["input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"],
    "an autoencoder": ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"],
    "a text encoder:": ["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"],
    "a text encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "an image encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.x"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "a textual inversion": ["emb_params"],
    "a ControlNet-LLLite of another network": ["lllite_dit_blocks_0_self_attn_q_proj.down.0.weight"],
    "a ControlNet Union": ["control_add_embedding.linear_1.bias", "task_embedding", "input_blocks.0.0.weight"],
    "a ControlNet-XS in its original layout": ["control_model.enc_zero_convs_in.0.0.weight"],
    "a ControlNet of a diffusion transformer": ["controlnet_blocks.0.weight", "x_embedder.weight"],
    "a Sana with its control in one file": ["controlnet.0.copied_block.attn.qkv.weight", "x_embedder.w"],
    "a motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "an optimizer or training state": ["optimizer.state.0.exp_avg"],
    "unknown (2 tensors, such as a)": ["a", "b.weight"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_control_is_called_by_its_name(tmp_path, name):
    save_file({key: torch.zeros(2, 2) for key in FOREIGN[name]}, tmp_path / "control_sd15_canny.safetensors")
    not_read(tmp_path / "control_sd15_canny.safetensors", "wrong-kind", name.rstrip("."))


def test_a_textual_inversion_of_the_old_kind(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}}, tmp_path / "a.pt")
    not_read(tmp_path / "a.pt", "wrong-kind", "a textual inversion")


def test_unets_of_diffusers_are_bases(tmp_path, tiny_base):
    save_file(tiny_base.unet.state_dict(), tmp_path / "a.safetensors")
    not_read(tmp_path / "a.safetensors", "wrong-kind", "a UNet with diffusers' names")
    tiny_base.vae.save_pretrained(tmp_path / "vae")
    save_file(tiny_base.vae.state_dict(), tmp_path / "b.safetensors")
    not_read(tmp_path / "b.safetensors", "wrong-kind", "an autoencoder")
    not_read(tmp_path / "vae", "wrong-kind", "an autoencoder")


class Evil:
    """A pickle that makes a folder when it is read as a program."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": {"a": torch.zeros(1)}, "x": evil}])
def test_a_pickle_that_would_run_a_program_is_refused_and_does_not(tmp_path, new, wrap):
    path = tmp_path / "control_v11p_sd15_canny.pth"
    torch.save(wrap(Evil(tmp_path / "made")), path, _use_new_zipfile_serialization=new)
    not_read(path, "unsafe-pickle", "mkdir", "safetensors")
    assert not (tmp_path / "made").exists()


class Harmless:
    pass


def test_a_pickle_of_other_objects_is_refused_with_their_name(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Harmless()}, tmp_path / "a.ckpt")
    not_read(tmp_path / "a.ckpt", "unsafe-pickle", "Harmless")


@pytest.mark.parametrize(
    ("content", "code", "fact"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1", "wrong-kind", "Git LFS"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "wrong-kind", "web page"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 60, "wrong-kind", "image"),
        (b"GGUF" + b"0" * 60, "wrong-kind", "GGUF"),
        (b"PK\x03\x04" + b"0" * 60, "damaged-file", "torch.save"),
        (b"\x80\x02" + b"0" * 60, "damaged-file", "torch.save"),
    ],
)
def test_what_is_no_file_of_tensors(tmp_path, content, code, fact):
    (tmp_path / "model.safetensors").write_bytes(content)
    not_read(tmp_path / "model.safetensors", code, fact)


def test_a_torn_file_of_torch_save(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for keep in (100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pth").write_bytes(whole[:keep])
        not_read(tmp_path / "a.pth", "damaged-file", "torch.save")
    torch.save(torch.zeros(3), tmp_path / "b.pth")
    not_read(tmp_path / "b.pth", "wrong-kind", "Tensor")


def test_a_loha_is_not_said_to_be_usable(tmp_path):
    save_file({"lora_unet_mid_block.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    words = describe(str(tmp_path / "a.safetensors"))["what"]
    assert "LoHa" in words and "--lora" not in words


def test_tensors_without_values_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3), "b": torch.zeros(3, device="meta")}, tmp_path / "a.pth")
    not_read(tmp_path / "a.pth", "damaged-file", "b")


@pytest.fixture
def original(tiny_control, tiny_base, tmp_path):
    path = save_control(tmp_path / "ours.safetensors", tiny_control, tiny_base)
    return weights_of(convert(path, tmp_path / "original.safetensors", "original").path)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (
            lambda state: state.pop("control_model.input_blocks.0.0.bias"),
            "1 of its 88 tensors are missing: control_model.",
        ),
        (lambda state: [state.pop(n) for n in list(state) if "zero_convs" in n], "8 of its 88 tensors are missing"),
        (lambda state: state.update(stray=torch.zeros(2)), "1 tensors do not belong to it: stray"),
        (
            lambda state: state.update({f"control_model.hint_block.{n}": torch.zeros(2) for n in range(5)}),
            "hint_block.0, control_model.hint_block.1, control_model.hint_block.2 and 2 more",
        ),
        (
            lambda state: state.update({"control_model.zero_convs.0.0.weight": torch.zeros(3, 3)}),
            "zero_convs.0.0.weight has the shape (3, 3), not (16, 16, 1, 1)",
        ),
    ],
)
def test_every_missing_unused_or_misshapen_tensor_is_named(original, tmp_path, change, fact):
    path = tmp_path / "changed.pth"
    expected = f"of its {len(original)} tensors"
    change(original)
    torch.save(original, path)
    not_read(path, "damaged-file", "a ControlNet", fact.replace("of its 88 tensors", expected))


def test_a_controlnet_is_told_by_its_resnet_blocks_whatever_one_tensor_it_lost(original):
    (of_original,) = (one for one in ControlNet.formats if one.name == "original")
    for lost in original:
        rest = {name: value for name, value in original.items() if name != lost}
        assert of_original.detect(TensorFile(Path("a.pth"), rest)), lost
    others = {name: value for name, value in original.items() if "_layers." not in name}
    assert "control_model.zero_convs.0.0.weight" in others and "control_model.input_hint_block.0.weight" in others
    assert of_original.detect(TensorFile(Path("a.pth"), others)) is None


def test_a_mixed_up_file_names_what_does_not_belong(original, tmp_path):
    original |= {f"lora_unet_{number}.lora_up.weight": torch.zeros(2, 2) for number in range(4)}
    save_file(original, tmp_path / "mixed.safetensors")
    not_read(tmp_path / "mixed.safetensors", "damaged-file", "a ControlNet", "4 tensors", "lora_unet_0")


def test_names_mean_nothing(tiny_control, tiny_base, tmp_path):
    path = save_control(tmp_path / "vae-ft-mse.ckpt.safetensors", tiny_control, tiny_base)
    assert detect(path).kind == "controlnet"
    _, adapter, shared = trained_pair(tiny_base, tmp_path)
    assert [detect(p).kind for p in (adapter, shared)] == ["ctrlora", "ctrlora-base"]
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    shutil.copy(adapter, swapped / "base.safetensors")
    shutil.copy(shared, swapped / "palette.safetensors")
    assert load_control(swapped / "base.safetensors", tiny_base).condition == "palette"


def test_folders(tmp_path, base_folder, tiny_control):
    with refused("wrong-kind", base_folder, "a base"):
        load_control(base_folder)
    (tmp_path / "empty").mkdir()
    not_read(tmp_path / "empty", "wrong-kind", "config.json")
    folder = tmp_path / "no-weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    not_read(folder, "missing-file", "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "SomethingElse"}))
    not_read(folder, "wrong-kind", "SomethingElse")
    tiny_control.to_diffusers().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "diffusion_pytorch_model.bin").is_file()
    assert load_control(tmp_path / "pickled").kind == "controlnet"
    tiny_control.to_diffusers().save_pretrained(tmp_path / "half", variant="fp16")
    tiny_control.to_diffusers().save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert (tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    for name in ("half", "parts"):
        state = load_control(tmp_path / name).state_dict()
        assert all(torch.equal(value, tiny_control.state_dict()[key]) for key, value in state.items())
    first, second, *_ = sorted((tmp_path / "parts").glob("*.safetensors"))
    name, value = next((name, value) for name, value in load_file(first).items() if name.endswith(".weight"))
    save_file({**load_file(second), f"{name.removesuffix('.weight')}.scale_weight": torch.tensor(2.0)}, second)
    assert torch.equal(load_control(tmp_path / "parts").file_state()[name], 2 * value)
    save_file({**load_file(second), name: value}, second)
    not_read(tmp_path / "parts", "damaged-file", name, second.name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_are_refused(tiny_control, tiny_base, tmp_path, dtype):
    path = save_control(tmp_path / "a.safetensors", tiny_control, tiny_base)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(dtype)}, path, metadata)
    with refused("damaged-file", name, str(dtype).removeprefix("torch.")):
        load_control(path)


def test_describe_tells_every_kind(tiny_control, tiny_base, tmp_path):
    _, adapter, shared = trained_pair(tiny_base, tmp_path)
    facts = describe(str(adapter))
    assert (facts["kind"], facts["layout"], facts["rank"], facts["condition"]) == (
        "ctrlora",
        "controlkit",
        3,
        "palette",
    )
    assert facts["reads"] == "time, text"
    assert describe(str(shared))["tensors"] == len(weights_of(shared))
    made = convert(adapter, tmp_path / "o.safetensors", "original").path
    assert describe(str(made))["parameters"] == facts["parameters"]
    torch.save(weights_of(made), tmp_path / "lora.ckpt")
    foreign = describe(str(tmp_path / "lora.ckpt"))
    assert foreign["layout"] == "original" and foreign["metadata"] == {} and foreign["condition"] == "not recorded"


def test_loading_a_controlnet_keeps_to_its_class(tiny_control, tmp_path):
    network = tiny_control.to_diffusers()
    assert isinstance(network, ControlNetModel)
    network.save_pretrained(tmp_path / "n")
    assert describe(str(tmp_path / "n"))["layout"] == "diffusers"
