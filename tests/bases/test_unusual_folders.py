"""Folders that are legal but unusual load as in diffusers; incomplete and unsupported ones are refused in words."""

from __future__ import annotations

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from controlkit.apps.cli import main
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.bases.meta import prompt_reader
from controlkit.controls.controlnet_sd3 import ControlNetSD3
from controlkit.sampling.embeddings import read_embeddings
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from refusals import refused
from tiny import (
    build_tiny_flux,
    build_tiny_flux2,
    build_tiny_flux2_klein,
    build_tiny_qwen_image,
    build_tiny_sana,
    build_tiny_sd3,
    build_tiny_z_image,
    parts_of,
    saved_pipeline,
)


def changed(path, **settings):
    """The JSON file with other settings; None removes one."""
    content = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture
def sd3_folder(tmp_path):
    return saved_pipeline(build_tiny_sd3(), tmp_path / "sd3")


# An autoencoder that overflows float16


@pytest.fixture
def overflowing(tiny_base):
    """Its decoder and encoder have values above 65504, which norms scale down again."""
    base = copy.deepcopy(tiny_base)
    for network in (base.vae.decoder, base.vae.encoder):
        for parameter in network.conv_in.parameters():
            parameter.data *= 3e5
    return base


def test_an_autoencoder_that_overflows_float16_runs_in_float32(overflowing):
    settings = {"prompt": "red apple", "seeds": [3], "steps": 2}
    (expected,) = sample(overflowing, **settings)
    halved = copy.deepcopy(overflowing).to(dtype=torch.float16)
    assert not halved.vae.decode(torch.randn(1, 4, 16, 16).half()).sample.isfinite().all()
    (made,) = sample(halved, **settings)
    assert halved.vae.dtype == torch.float32 and halved.dtype == torch.float16
    assert (made.float() - expected).abs().mean() < 0.02
    image = torch.rand(1, 3, 64, 64)
    encoded = copy.deepcopy(overflowing).to(dtype=torch.float16).encode_image(image)
    assert encoded.isfinite().all() and (encoded.float() - overflowing.encode_image(image)).abs().max() < 0.1


def test_several_threads_find_that_it_overflows(overflowing):
    halved = copy.deepcopy(overflowing).to(dtype=torch.float16)
    latents = torch.randn(4, 4, 16, 16).half()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda latent: halved.decode(latent[None]), latents))
    assert all(image.isfinite().all() for image in made) and halved.vae.dtype == torch.float32


def test_one_that_does_not_stays_in_float16(tiny_base):
    halved = copy.deepcopy(tiny_base).to(dtype=torch.float16)
    list(sample(halved, prompt="red apple", seeds=[3], steps=1))
    assert halved.vae.dtype == torch.float16


def test_images_that_are_not_finite_are_an_error(tiny_base):
    base = copy.deepcopy(tiny_base)
    base.vae.decoder.conv_out.bias.data[0] = torch.nan
    with refused("damaged-file", "decoder.conv_out.bias", "NaN"):
        list(sample(base, prompt="red apple", seeds=[3], steps=1))


# Tokenizers


def test_a_tokenizer_without_vocabulary(base_folder):
    """transformers makes an empty one, which reads all prompts alike."""
    for path in (base_folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with refused("missing-file", base_folder, "tokenizer has no vocabulary"):
        load_base(base_folder)


def test_a_missing_tokenizer_is_not_looked_up_elsewhere(base_folder, monkeypatch):
    shutil.rmtree(base_folder / "tokenizer")
    monkeypatch.chdir(base_folder.parent)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it asks a server"))
    with refused("missing-file", "tokenizer is missing"):
        load_base(base_folder.name)


@pytest.mark.parametrize(
    ("build", "tokens"),
    [
        (build_tiny_sd3, 256),
        (partial(build_tiny_sd3, t5=False), 77),
        (build_tiny_flux, 512),
        (build_tiny_z_image, 512),
        (build_tiny_qwen_image, 512),
        (build_tiny_flux2, 512),
        (build_tiny_flux2_klein, 512),
        (build_tiny_sana, 300),
    ],
)
def test_how_much_of_a_prompt_is_read_needs_no_weights(build, tokens, tmp_path):
    folder = saved_pipeline(build(), tmp_path / "base")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    reading = prompt_reader(str(folder))
    assert reading.prompt_tokens == tokens
    assert not reading.cut_from("a " * 30) and reading.cut_from("a " * 600)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told_of(base_folder, file):
    (base_folder / "tokenizer" / file).write_text("{")
    for read in (load_base, prompt_reader):
        with refused("damaged-file", base_folder):
            read(str(base_folder))


# Optional components of Stable Diffusion 3


def test_t5_needs_its_tokenizer(sd3_folder):
    (sd3_folder / "model_index.json").unlink()
    shutil.rmtree(sd3_folder / "tokenizer_3")
    with refused("missing-file", "text_encoder_3 without tokenizer_3"):
        load_base(sd3_folder)


def test_a_tokenizer_may_be_there_without_its_encoder(tmp_path):
    """As diffusers saves a pipeline that was loaded without T5."""
    pipeline = StableDiffusion3Pipeline(**{**parts_of(build_tiny_sd3()), "text_encoder_3": None})
    pipeline.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "tokenizer_3").is_dir()
    base = load_base(tmp_path / "base")
    assert base.text_encoder_3 is None and base.encode_text(["a"]).tokens.shape[1] == 77 + 256
    assert prompt_reader(str(tmp_path / "base")).prompt_tokens == 77


# Settings of networks


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        ("unet", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ("text_encoder", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ("unet", {"num_class_embeds": 4}, "num_class_embeds"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type"),
        ("text_encoder", {"use_attention_mask": True}, "use_attention_mask"),
    ],
)
def test_what_is_not_supported_is_refused(base_folder, part, settings, said, capsys):
    changed(base_folder / part / "config.json", **settings)
    with refused("unsupported", base_folder, said):
        load_base(base_folder)
    assert main(["inspect", str(base_folder)]) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("side", "size"), [([16, 16], 64), ([16, 32], 64), (None, 64)])
def test_a_side_of_another_kind(base_folder, side, size):
    config = json.loads((base_folder / "unet" / "config.json").read_text())
    (base_folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": side}))
    assert load_base(base_folder).size == size
    made = generate(GenerateRequest(prompt="red apple", base=str(base_folder), steps=1))
    assert made.images[0].image.size == (size, size)
    assert main(["inspect", str(base_folder)]) == 0


# Noise schedules


def test_an_unknown_noise_schedule_is_an_error_at_once(base_folder):
    changed(base_folder / "scheduler" / "scheduler_config.json", beta_schedule="cosine")
    with refused("damaged-file", base_folder, "cosine"):
        load_base(base_folder)


@pytest.mark.parametrize("own", ["use_exponential_sigmas", "use_beta_sigmas"])
def test_karras_spacing_replaces_that_of_the_base(sd1_scheduled_base, own):
    def made(**settings) -> torch.Tensor:
        base = copy.copy(sd1_scheduled_base)
        base.__dict__.pop("schedule", None)
        base.scheduler_config = {**base.scheduler_config, **settings}
        return base.schedule.solver("dpm++-karras", 6, "cpu", "base").timesteps

    assert torch.equal(made(**{own: True}), made())


def test_too_many_steps_for_lcm(sd1_scheduled_base):
    solver = sd1_scheduled_base.schedule.solver
    assert len(solver("lcm", 50, "cpu", "base").timesteps) == 50
    with refused("out-of-range", "at most 50 steps", "60"):
        solver("lcm", 60, "cpu", "base")


# Others


@pytest.mark.parametrize("build", [build_tiny_sd3, build_tiny_flux])
def test_a_transformer_takes_no_textual_inversion(build, tmp_path):
    base: Base = build()
    with refused("unsupported", base.name, "not supported"):
        read_embeddings([str(tmp_path / "word.safetensors")], base)


def test_a_size_for_which_a_control_has_no_positions():
    base = build_tiny_sd3(t5=False)
    config = {**ControlNetSD3.for_base(base).config(), "pos_embed_max_size": 10}
    control = ControlNetSD3.from_config(config)
    limit = 10 * base.size_multiple
    control.encode(torch.zeros(1, 3, limit, limit), base)
    with refused("wrong-size", f"{limit + base.size_multiple} pixels", str(limit)):
        control.encode(torch.zeros(1, 3, limit, limit + base.size_multiple), base)
