"""A diffusers folder is a base; what is not one is refused in words."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from controlkit.bases import folders, load, networks
from controlkit.bases.devices import choose_dtype
from controlkit.bases.load import load_base
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.errors import UserError
from controlkit.sampling.sampler import images_at_once, sample
from refusals import refused

PART_CODES = {"unet": "wrong-kind"} | dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler"), "missing-file")


def not_loaded(folder, code, *facts):
    with refused(code, *facts) as caught:
        load_base(folder)
    assert "\n" not in str(caught.value)


def test_a_saved_base_loads_frozen_and_in_float32(base_folder, tiny_base):
    base = load_base(base_folder)
    assert base.dtype == torch.float32 and base.size == 64 and base.factor == 4 and base.latent_channels == 4
    assert not any(p.requires_grad for network in base.networks for p in network.parameters())
    assert not any(network.training for network in base.networks)
    assert base.fingerprint == tiny_base.fingerprint
    # Its weights are those of the file, which are half as long as they were in memory, and nothing else is.
    halved = copy.copy(tiny_base)
    halved.text_encoder = copy.deepcopy(tiny_base.text_encoder).half().float()
    text, expected = (found.encode_text(["red apple"]).tokens for found in (base, halved))
    assert (text - expected).abs().max() < 1e-6
    assert load_base(base_folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_it_draws_with_no_code_of_ours(base_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("red apple", num_inference_steps=2, height=64, width=64).images
    assert image.size == (64, 64)


def test_a_folder_that_is_not_there(tmp_path):
    not_loaded(tmp_path / "nothing", "missing-file", tmp_path / "nothing", "nano")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    not_loaded(
        tmp_path / "model.bin", "wrong-kind", tmp_path / "model.bin", ".safetensors or .ckpt", "controlkit inspect"
    )


def test_an_empty_folder(tmp_path):
    not_loaded(tmp_path, "wrong-kind", tmp_path, "unet/config.json")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_part_is_missing(base_folder, part):
    shutil.rmtree(base_folder / part)
    not_loaded(base_folder, PART_CODES[part], part)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_under_another_name_are_not_taken(base_folder, part):
    (weights,) = (base_folder / part).glob("*.safetensors")
    weights.rename(weights.with_name("weights.safetensors"))
    not_loaded(base_folder, "missing-file", f"{base_folder}/{part}", ".safetensors or .bin")


class Malice:
    """What would make a file if it were unpickled as a program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_files_of_torch_are_read_as_data_alone(base_folder, part, tmp_path):
    before = load_base(base_folder)
    (weights,) = (base_folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, base_folder / part / name)
    assert load_base(base_folder).content == before.content
    torch.save({**tensors, "more": Malice(tmp_path / "made")}, base_folder / part / name)
    not_loaded(base_folder, "unsafe-pickle", base_folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_torn_weights(base_folder, part, keep):
    (weights,) = (base_folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    not_loaded(base_folder, "damaged-file", base_folder)


@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_torn_settings(base_folder, part):
    path = base_folder / part
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{part} .*JSON"):
        load_base(base_folder)


def test_weights_of_another_network(base_folder):
    path = base_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [32, 32]}))
    not_loaded(base_folder, "damaged-file", base_folder)


@pytest.mark.parametrize("missing", ["conv_out.weight", "mid_block.resnets.0.conv1.weight"])
def test_weights_with_a_hole_are_not_filled_at_random(base_folder, missing):
    from safetensors.torch import load_file, save_file

    (path,) = (base_folder / "unet").glob("*.safetensors")
    tensors = load_file(path)
    del tensors[missing]
    save_file(tensors, path, {"format": "pt"})
    not_loaded(base_folder, "damaged-file", "unet", missing)


def test_a_device_that_is_not_there(base_folder):
    with refused("device-unavailable", "gpu9", "cpu", "cuda", "mps", "auto"):
        load_base(base_folder, device="gpu9")
    if not torch.cuda.is_available():
        with refused("device-unavailable", "cuda"):
            load_base(base_folder, device="cuda")


@pytest.mark.parametrize(("size", "facts"), [((63, 64), ("width 63", "64")), ((64, 7), ("height 7", "8"))])
def test_sizes_that_the_base_cannot_draw(tiny_base, size, facts):
    with refused("wrong-size", tiny_base.name, *facts):
        tiny_base.check_size(*size)
    for bad in ((0, 64), (64, -8)):
        with refused("wrong-size", "multiple of 4"):
            tiny_base.check_size(*bad)
    tiny_base.check_size(68, 4)


def test_images_and_latents_have_the_shapes_that_are_promised(tiny_base):
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = tiny_base.encode_image(x)
    assert z.shape == (2, 4, 16, 16)
    assert tiny_base.decode(z).shape == x.shape and tiny_base.decode(z * 100).abs().max() <= 1


@pytest.mark.parametrize("said", [{}, {"clip_sample": True}])
def test_latents_are_never_clipped(base_folder, said):
    path = base_folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    settings.pop("clip_sample")
    path.write_text(json.dumps({**settings, **said}))
    assert load_base(base_folder).schedule.config["clip_sample"] is False


def with_channels(base_folder, tiny_base, channels):
    config = {**tiny_base.unet.config, "in_channels": channels}
    UNet2DConditionModel.from_config(config).save_pretrained(base_folder / "unet")


def test_an_inpainting_model_is_one_of_9_channels(base_folder, tiny_base):
    assert not load_base(base_folder).is_inpainting
    with_channels(base_folder, tiny_base, 9)
    base = load_base(base_folder)
    assert base.is_inpainting and base.latent_channels == 4


@pytest.mark.parametrize("channels", [5, 8])
def test_a_base_of_other_channels_is_refused(base_folder, tiny_base, channels):
    """Of depth, and of editing by instructions."""
    with_channels(base_folder, tiny_base, channels)
    not_loaded(base_folder, "unsupported", f"{channels} channels", "4", "inpainting")


@pytest.mark.parametrize(
    ("part", "settings", "facts"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, ("EDMEulerScheduler",)),
        ("scheduler/scheduler_config.json", {"_class_name": None, "sigma_data": 0.5}, ("EDM", "sigma_data")),
        ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, ("latents_mean and latents_std",)),
    ],
)
def test_a_base_of_edm_or_with_normalised_latents_is_refused(base_folder, part, settings, facts):
    path = base_folder / part
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    not_loaded(base_folder, "unsupported", *facts)


def test_a_schedule_without_betas_is_diffusers_own(base_folder):
    """As configurations of schedulers are often written, with what differs from the class's defaults."""
    path = base_folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}))
    assert load_base(base_folder).schedule.config["beta_schedule"] == DDIMScheduler().config["beta_schedule"]


def test_a_device_without_numbers_is_refused(base_folder):
    with refused("device-unavailable", "meta", "cpu"):
        load_base(base_folder, device="meta")


def test_the_end_of_a_prompt_that_is_not_read_is_told(tiny_base):
    assert tiny_base.cut_from("red apple") == ""
    words = " ".join(["apple"] * 40)
    cut = tiny_base.cut_from(words)
    assert words.endswith(cut) and 0 < len(cut) < len(words)
    kept = words.removesuffix(cut)
    assert torch.equal(tiny_base.encode_text([words]).tokens, tiny_base.encode_text([kept + "red " + cut]).tokens)
    assert not torch.equal(tiny_base.encode_text([words]).tokens, tiny_base.encode_text(["red " + words]).tokens)


def test_a_thousand_steps_stay_within_the_schedule(sd1_scheduled_base, monkeypatch):
    times = []

    def predict(self, x_t, t, text, residuals=None, taps=None):
        times.append(int(t))
        return torch.zeros_like(x_t)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    (image,) = sample(sd1_scheduled_base, prompt="red apple", seeds=[0], steps=1000)
    assert max(times) == 999 and len(times) == 1000 and image.shape == (1, 3, 64, 64)


def test_large_images_go_through_the_autoencoder_a_few_at_a_time(tiny_base, monkeypatch):
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    z, y = tiny_base.encode_image(x), tiny_base.decode(tiny_base.encode_image(x))
    seen = []
    for network in (tiny_base.vae.encoder, tiny_base.vae.decoder):
        monkeypatch.setattr(network, "forward", counted(network.forward, seen))
    monkeypatch.setattr("controlkit.bases.latent_space.PIXELS_AT_ONCE", 2 * 64 * 64)
    assert torch.allclose(tiny_base.encode_image(x), z, atol=1e-5)
    assert torch.allclose(tiny_base.decode(z), y, atol=1e-5)
    assert seen == [2, 1, 2, 1]


def counted(function, seen):
    def call(x, *args, **kwargs):
        seen.append(len(x))
        return function(x, *args, **kwargs)

    return call


def test_guidance_is_what_suits_the_base_where_none_is_asked_for(tiny_base, sd1_scheduled_base, base_folder):
    assert tiny_base.default_guidance == load_base().default_guidance == load_base(base_folder).default_guidance == 3
    assert sd1_scheduled_base.default_guidance == 7.5
    (base_folder / "model_index.json").write_text('{"_controlkit": {"guidance": 4, "mode": "balanced"}}')
    assert (load_base(base_folder).default_guidance, load_base(base_folder).default_mode) == (4, "balanced")
    (base_folder / "model_index.json").write_text("{")
    assert (load_base(base_folder).default_guidance, load_base(base_folder).default_mode) == (7.5, "balanced")
    drawn = [torch.cat(list(sample(tiny_base, prompt="red apple", seeds=[0], steps=2, guidance=g))) for g in (None, 3)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("width", "count"), [(64, 16), (256, 16), (512, 4), (1024, 1), (4096, 1)])
def test_fewer_large_images_are_drawn_at_once(width, count):
    assert images_at_once(width, width) == count


def test_what_weights_are_stored_in():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", cpu) == torch.float32 and choose_dtype("auto", cuda) == torch.float16
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with refused("unknown-name", "fp8", "auto, fp32, fp16, bf16"):
        choose_dtype("fp8", cpu)


def test_what_a_base_is_known_by_does_not_depend_on_the_type_it_is_held_in(tiny_base, base_folder):
    halves = load_base(base_folder, dtype=torch.bfloat16)
    assert halves.dtype == halves.vae.dtype == torch.bfloat16
    whole = load_base(base_folder)
    assert (halves.fingerprint, halves.content) == (whole.fingerprint, whole.content)
    assert load_base(base_folder, dtype=torch.float16).fingerprint == tiny_base.fingerprint == whole.fingerprint


def test_the_end_of_a_prompt_with_a_cut_character_is_not_looked_for(tiny_base):
    with pytest.raises(UserError, match=r"the prompt 'red .udcff apple' ") as caught:
        tiny_base.cut_from("red \udcff apple")
    assert caught.value.code == "bad-data"


def test_bf16_is_read_as_such_and_nothing_is_hashed_before_it_is_asked_for(base_folder, monkeypatch):
    read, hashed = [], []
    own_load_network, own_hash = folders.load_network, networks.hash_of_halves

    def whole(component, folder, dtype):
        read.append(dtype)
        return own_load_network(component, folder, dtype)

    monkeypatch.setattr(folders, "load_network", whole)
    monkeypatch.setattr(networks, "hash_of_halves", lambda weights: hashed.append(1) or own_hash(weights))
    made = load_base(base_folder, dtype=torch.bfloat16)
    list(sample(made, prompt="red apple", seeds=[0], steps=1))
    assert set(read) == {torch.bfloat16} and not hashed
    expected = made.fingerprint
    assert hashed == [1] and read.count(torch.float32) == 3
    assert made.content and hashed == [1] and read.count(torch.float32) == 3  # read once for both
    assert load_base(base_folder).fingerprint == expected


def test_the_fingerprint_of_a_folder_needs_its_denoising_network_only(base_folder, tiny_base):
    shutil.rmtree(base_folder / "tokenizer")
    for weights in (base_folder / "vae").glob("*.safetensors"):
        weights.write_bytes(b"not read")
    assert load.denoiser_fingerprint(base_folder) == tiny_base.fingerprint
    (weights,) = (base_folder / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with refused("damaged-file", base_folder):
        load.denoiser_fingerprint(base_folder)


def test_the_content_of_a_base_counts_its_tokenizer(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "other")
    before = load_base(base_folder)
    path = tmp_path / "other" / "tokenizer" / "tokenizer.json"
    text = json.loads(path.read_text())
    vocabulary = text["model"]["vocab"]
    one, other = list(vocabulary)[3:5]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(text))
    after = load_base(tmp_path / "other")
    assert (after.fingerprint, after.former_content) == (before.fingerprint, before.former_content)
    assert after.content != before.content
    cast = load_base(tmp_path / "other", dtype=torch.bfloat16)
    assert (cast.content, cast.former_content) == (after.content, after.former_content)
