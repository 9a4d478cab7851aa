"""A whole model in one file of the original layout, read without network and without code."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_names import original_text, original_unet, original_vae
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from controlkit.bases.families import family_of_file
from controlkit.bases.load import load_base
from controlkit.bases.meta import meta_base
from controlkit.bases.single_file import load_single_file, write_config
from controlkit.bases.stable_diffusion import StableDiffusion
from refusals import refused
from tiny import _TINY_TEXT, SD1_SCHEDULE, SDXL_PARTS

PARTS = {
    "unet": {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
    },
    "vae": {**SDXL_PARTS["vae"], "force_upcast": False},
    "text_encoder": {**_TINY_TEXT, **SDXL_PARTS["text_encoder"]},
    "scheduler": SD1_SCHEDULE,
}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {
        "unet": UNet2DConditionModel(**PARTS["unet"]).eval(),
        "vae": AutoencoderKL(**PARTS["vae"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**PARTS["text_encoder"])).eval(),
    }


@pytest.fixture(scope="module")
def tensors(networks):
    state = original_unet(networks["unet"]) | original_vae(networks["vae"])
    return {name: value.contiguous() for name, value in (state | original_text(networks["text_encoder"])).items()}


@pytest.mark.parametrize("layout", ["safetensors", "ckpt", "lightning"])
def test_every_weight_arrives(networks, tensors, tmp_path, layout):
    path = tmp_path / f"model.{'safetensors' if layout == 'safetensors' else 'ckpt'}"
    if layout == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if layout == "lightning" else tensors, path)
    base = load_single_file(path, torch.float32, PARTS)
    for name, network in networks.items():
        theirs = getattr(base, name).state_dict()
        for key, value in network.state_dict().items():
            assert torch.equal(theirs[key], value), (name, key)
    made = base.predict(torch.ones(1, 4, 16, 16), torch.tensor([3]), base.encode_text(["a red apple"]))
    assert made.shape == (1, 4, 16, 16)


def test_the_file_says_what_it_predicts(tensors, tmp_path):
    save_file(tensors, tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    assert load_single_file(tmp_path / "v.safetensors", torch.float32, PARTS).prediction_type == "v_prediction"


def test_a_missing_weight_is_never_filled_in(tensors, tmp_path):
    cut = {name: value for name, value in tensors.items() if not name.endswith("out.2.weight")}
    save_file(cut, tmp_path / "cut.safetensors")
    with refused("damaged-file", tmp_path / "cut.safetensors", "sd15"):
        load_single_file(tmp_path / "cut.safetensors", torch.float32, PARTS)


def test_what_is_not_a_whole_model_is_said(tensors):
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def without(prefix):
        return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}

    assert family_of_file(shapes, "file")[1] == "sd15"
    for prefix, fact in (
        ("model.diffusion_model.", "model.diffusion_model"),
        ("first_stage_model.", "autoencoder"),
        ("cond_stage_model.", "text encoder"),
    ):
        with refused("wrong-kind", "file", fact):
            family_of_file(without(prefix), "file")[1]
    second = {**without("cond_stage_model."), "cond_stage_model.model.ln_final.weight": (1024,)}
    assert family_of_file(second, "file")[1] == "sd21"
    third = {**without("cond_stage_model."), "model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}
    with refused("unsupported", "file", "refiner"):
        family_of_file(third, "file")[1]
    assert family_of_file({**third, "conditioner.embedders.1.model.ln_final.weight": (1280,)}, "file")[1] == "sdxl"


class Runs:
    """What a hostile file would hold."""

    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, capsys):
    torch.save({"state_dict": Runs()}, tmp_path / "model.ckpt")
    with refused("unsafe-pickle", tmp_path / "model.ckpt", "safetensors") as caught:
        load_base(tmp_path / "model.ckpt")
    assert "weights_only" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


def test_a_torn_file_is_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with refused("damaged-file", tmp_path / "model.safetensors", "safetensors"):
        load_base(tmp_path / "model.safetensors")


def test_an_empty_tensor_says_that_it_predicts_v(tensors, tmp_path):
    save_file({**tensors, "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    plain, zero = (load_single_file(tmp_path / f"{name}.safetensors", torch.float32, PARTS) for name in "vz")
    assert plain.prediction_type == zero.prediction_type == "v_prediction"
    assert not plain.schedule.config["rescale_betas_zero_snr"]
    assert zero.schedule.ends_in_pure_noise and zero.schedule.config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_file_of_edm_is_refused(tensors, mark, tmp_path):
    save_file({**tensors, mark: torch.zeros(4)}, tmp_path / "model.safetensors")
    with refused("unsupported", tmp_path / "model.safetensors", "EDM"):
        load_single_file(tmp_path / "model.safetensors", torch.float32, PARTS)


@pytest.mark.parametrize("held", [{"state_dict": torch.zeros(2)}, {0: torch.zeros(2)}])
def test_a_file_that_holds_something_else_is_refused_in_words(tmp_path, held):
    torch.save(held, tmp_path / "x.ckpt")
    with refused("wrong-kind", tmp_path / "x.ckpt", "Stable Diffusion", "controlkit inspect"):
        load_base(tmp_path / "x.ckpt")


def test_a_file_of_9_channels_is_an_inpainting_model(tensors, tmp_path):
    wide = torch.zeros(16, 9, 3, 3)
    save_file({**tensors, "model.diffusion_model.input_blocks.0.0.weight": wide}, tmp_path / "model.safetensors")
    base = load_single_file(tmp_path / "model.safetensors", torch.float32, PARTS)
    assert base.is_inpainting and base.latent_channels == 4


@pytest.mark.parametrize("mark", ["model.diffusion_model.out.2.scale_weight", "scaled_fp8"])
def test_scaled_float8_is_refused_not_read_without_its_scales(tensors, mark, tmp_path):
    save_file({**tensors, mark: torch.ones(1)}, tmp_path / "model.safetensors")
    with refused("unsupported", tmp_path / "model.safetensors", mark, "float16"):
        load_single_file(tmp_path / "model.safetensors", torch.float32, PARTS)


def test_the_folder_beside_a_file_sets_its_defaults(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder, StableDiffusion, PARTS)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_controlkit": {"guidance": 2.5}}))
    assert load_single_file(tmp_path / "model.safetensors", torch.float32, PARTS).default_guidance == 2.5
    assert meta_base(str(tmp_path / "model.safetensors")).default_guidance == 2.5


def test_what_version_2_predicts_is_told_by_its_channels():
    known = StableDiffusion.known["sd21"]
    name = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, prediction, size in ((4, "v_prediction", 96), (9, "epsilon", 64)):
        made, (note,) = StableDiffusion.configurations_of_file(known, {name: (320, channels, 3, 3)}, {})
        assert (made["scheduler"]["prediction_type"], made["unet"]["sample_size"]) == (prediction, size)
        assert "beside the file" in note
    declared = {"modelspec.prediction_type": "v"}
    made, notes = StableDiffusion.configurations_of_file(known, {name: (320, 9, 3, 3)}, declared)
    assert made["scheduler"]["prediction_type"] == "v_prediction" and not notes
