"""Autoencoders in place of the base's own."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from original_names import original_vae
from safetensors.torch import save_file

from controlkit.bases.load import load_base
from controlkit.bases.vae import load_vae
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import read_settings
from refusals import refused
from tiny import SDXL_PARTS

SETTINGS = {"prompt": "red apple", "steps": 2, "guidance": 4.0}


def pixels(generation):
    return np.stack([np.asarray(one.image) for one in generation.images])


@pytest.fixture
def other_vae(tiny_base):
    torch.manual_seed(9)
    return AutoencoderKL.from_config(tiny_base.vae.config)


def test_an_autoencoder_of_ones_own_from_folders_and_files(base_folder, other_vae, tiny_base, tmp_path):
    other_vae.save_pretrained(tmp_path / "vae")
    weights = other_vae.state_dict()
    save_file(weights, tmp_path / "diffusers.safetensors")
    torch.save({"state_dict": {**weights, "loss.logvar": torch.zeros(1)}}, tmp_path / "diffusers.ckpt")
    (tmp_path / "model").mkdir()
    other_vae.save_pretrained(tmp_path / "model" / "vae")
    expected = (other_vae.decode(torch.ones(1, tiny_base.latent_channels, 4, 4)).sample).detach()
    own = load_base(base_folder)
    for name in ("vae", "diffusers.safetensors", "diffusers.ckpt", "model"):
        base = load_base(base_folder, vae=str(tmp_path / name))
        assert torch.equal(base.vae.decode(torch.ones(1, base.latent_channels, 4, 4)).sample, expected)
        assert not base.vae.training and not any(each.requires_grad for each in base.vae.parameters())
        assert base.fingerprint == own.fingerprint
        assert base.content != own.content


def test_an_autoencoder_in_the_original_format(base_folder, other_vae, tmp_path):
    whole = {name: value.contiguous() for name, value in original_vae(other_vae).items()}
    alone = {name.removeprefix("first_stage_model."): value for name, value in whole.items()}
    for name, tensors in (("whole", {**whole, "model.diffusion_model.out.2.bias": torch.zeros(4)}), ("alone", alone)):
        save_file({**tensors, "model_ema.decay": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        base = load_base(base_folder, vae=str(tmp_path / f"{name}.safetensors"))
        assert all(torch.equal(value, other_vae.state_dict()[key]) for key, value in base.vae.state_dict().items())


def test_images_of_another_autoencoder_say_so_and_repeat(base_folder, other_vae, tmp_path):
    other_vae.save_pretrained(tmp_path / "vae")
    asked = GenerateRequest(**SETTINGS, seeds=(1,), base=str(base_folder), vae=str(tmp_path / "vae"))
    made = generate(asked)
    assert (pixels(made) != pixels(generate(dataclasses.replace(asked, vae=None)))).any()
    made.save(tmp_path / "out")
    saved = read_settings(tmp_path / "out")
    assert (pixels(generate(saved.to_request())) == pixels(made)).all()
    torch.manual_seed(10)
    AutoencoderKL.from_config(other_vae.config).save_pretrained(tmp_path / "vae")
    assert any("vae" in note for note in saved.differences(generate(saved.to_request())))


def test_autoencoders_that_are_refused(base_folder, other_vae, tiny_base, tmp_path):
    with refused("missing-file", "nothing.safetensors"):
        load_base(base_folder, vae=str(tmp_path / "nothing.safetensors"))
    torn = tmp_path / "torn.safetensors"
    save_file(other_vae.state_dict(), torn)
    torn.write_bytes(torn.read_bytes()[:5000])
    with refused("damaged-file", "torn"):
        load_base(base_folder, vae=str(torn))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with refused("incompatible", "other"):
        load_base(base_folder, vae=str(tmp_path / "other.safetensors"))
    save_file({**other_vae.state_dict(), "decoder.more": torch.zeros(1)}, tmp_path / "more.safetensors")
    with refused("incompatible", "decoder.more"):
        load_base(base_folder, vae=str(tmp_path / "more.safetensors"))
    with refused("wrong-kind", "UNet2DConditionModel"):
        load_base(base_folder, vae=str(base_folder / "unet"))
    for key, value in (("scaling_factor", 0.5), ("latent_channels", 3), ("latents_mean", [0.0] * 4)):
        folder = tmp_path / key
        AutoencoderKL.from_config({**other_vae.config, key: value, "_use_default_values": []}).save_pretrained(folder)
        with refused("incompatible", key):
            load_base(base_folder, vae=str(folder))
    folder = tmp_path / "hole"
    other_vae.save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with refused("missing-file", "hole"):
        load_base(base_folder, vae=str(folder))
    holed = dict(list(other_vae.state_dict().items())[1:])
    save_file(holed, folder / "diffusion_pytorch_model.safetensors")
    with refused("damaged-file", "lacks 1"):
        load_base(base_folder, vae=str(folder))
    (folder / "config.json").write_text(json.dumps([]))
    with refused("wrong-kind", "hole"):
        load_base(base_folder, vae=str(folder))


def test_former_names_of_the_attention_are_read(tmp_path):
    own = AutoencoderKL(**SDXL_PARTS["vae"])
    weights = own.state_dict()
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for key, value in weights.items():
        for now, before in former.items():
            key = key.replace(now, before)
        renamed[key] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "former.safetensors")
    made = load_vae(str(tmp_path / "former.safetensors"), own, torch.float32)
    assert all(torch.equal(value, weights[key]) for key, value in made.state_dict().items())


def test_a_file_of_another_family_is_refused_where_it_can_be_told(base_folder, other_vae, tmp_path):
    AutoencoderKL.from_config({**other_vae.config, "scaling_factor": 0.5}).save_pretrained(tmp_path / "vae")
    with refused("incompatible", "scaling_factor", 0.5):
        load_base(base_folder, vae=str(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"))
    # A whole model in the original format is known by its UNet and text encoders.
    whole = {name: value.contiguous() for name, value in original_vae(other_vae).items()}
    parts = ("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.ln_final.weight")
    save_file({**whole, **{part: torch.zeros(1) for part in parts}}, tmp_path / "xl.safetensors")
    with refused("incompatible", "scaling_factor", 0.13025):
        load_base(base_folder, vae=str(tmp_path / "xl.safetensors"))
