"""Stable Diffusion XL through the same interface: parity with diffusers, controls, folders, known sizes."""

from __future__ import annotations

import copy
import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects

from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.folders import _UNWANTED_FROM_HUB, _WANTED_FROM_HUB
from controlkit.bases.load import load_base
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.data.pairs import write_pairs
from controlkit.formats.load import load_control, save_control
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run
from refusals import refused
from tiny import build_tiny_sdxl, randomise_zero_convolutions

PROMPT = "red apple on a blue table"
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_sdxl()


def parts(base):
    return {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "text_encoder_2": base.text_encoder_2,
        "tokenizer": base.tokenizer,
        "tokenizer_2": base.tokenizer_2,
        "unet": base.unet,
        "scheduler": DDIMScheduler.from_config(base.scheduler_config),
        "add_watermarker": False,
    }


def theirs(pipeline, negative=None, **changes):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [PROMPT] * len(SEEDS),
        negative_prompt=None if negative is None else [negative] * len(SEEDS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="pt",
        **changes,
    ).images


def ours(base, negative="", uses=()):
    batches = sample(base, prompt=PROMPT, negative_prompt=negative, seeds=SEEDS, steps=4, guidance=4.0, uses=uses)
    return torch.cat(list(batches))


@pytest.mark.parametrize("negative", [None, "cat face"])
def test_images_are_those_of_diffusers(base, negative):
    expected = theirs(StableDiffusionXLPipeline(**parts(base)), negative, height=64, width=64)
    assert (ours(base, negative or "") - expected).abs().max() < 1e-3


def test_a_controlnet_steers_as_in_diffusers(base, condition_image):
    torch.manual_seed(5)
    control = randomise_zero_convolutions(ControlNet.for_base(base, "canny").eval().requires_grad_(False))
    image = to_tensor([condition_image])
    made = ours(base, uses=[ActiveControl(control, control.encode(image, base), 0.7)])
    pipeline = StableDiffusionXLControlNetPipeline(**parts(base), controlnet=control.to_diffusers())
    expected = theirs(pipeline, image=[image] * len(SEEDS), controlnet_conditioning_scale=0.7)
    assert (made - expected).abs().max() < 1e-3
    assert (made - ours(base)).abs().max() > 1e-2


def test_ctrlora_starts_from_zero_and_its_plan_changes_nothing(base, condition_image):
    shared = BaseControlNet.for_base(base)
    shared.add_adapter("mine", 2, seed=0)
    control = CtrLoRA(shared, "mine", "canny").eval().requires_grad_(False)
    hint = control.encode(to_tensor([condition_image]), base)
    assert torch.equal(ours(base, uses=[ActiveControl(control, hint)]), ours(base))
    with torch.no_grad():
        for parameter in shared.adapters["mine"].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    text = base.encode_text(["", PROMPT])
    t = torch.tensor([500, 500])
    alone = control(None, t, text, hint)
    twice = CtrLoRA.forward_together([control, control], None, t, text, [hint, hint])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone.tensors(), twice[1].tensors(), strict=True))
    assert (ours(base, uses=[ActiveControl(control, hint)]) - ours(base)).abs().max() > 1e-3


def test_a_folder_loads_and_the_second_encoder_must_be_there(base, tmp_path):
    StableDiffusionXLPipeline(**parts(base)).save_pretrained(tmp_path / "xl")
    loaded = load_base(tmp_path / "xl")
    a, b = base.encode_text([PROMPT, ""]), loaded.encode_text([PROMPT, ""])
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    assert b.tokens[1].abs().max() == 0 and b["pooled"][1].abs().max() == 0
    assert loaded.fingerprint == base.fingerprint
    half = load_base(tmp_path / "xl", dtype=torch.float16)
    assert half.unet.dtype == torch.float16 and half.vae.dtype == torch.float32
    shutil.rmtree(tmp_path / "xl" / "text_encoder_2")
    with refused("missing-file", tmp_path / "xl", "text_encoder_2"):
        load_base(tmp_path / "xl")


def test_the_empty_prompt_is_told_the_size(base):
    text = base.encode_text([""], (96, 64))
    assert text["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]]


@pytest.mark.parametrize(("name", "count"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)])
def test_known_bases_have_their_size(name, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**KNOWN_BASES[name][1]["unet"])
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


def test_a_hub_id_that_cannot_be_fetched_is_said_in_one_sentence():
    with refused("download-failed", "nobody/nothing"):
        load_base("nobody/nothing")


def test_a_hub_id_is_a_folder_once_it_is_there(base, tmp_path, monkeypatch):
    import huggingface_hub

    StableDiffusionXLPipeline(**parts(base)).save_pretrained(tmp_path / "xl")
    asked = []

    def snapshot(name, **options):
        asked.append(name)
        return str(tmp_path / "xl")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_base("somebody/model").fingerprint == base.fingerprint
    assert asked == ["somebody/model"]


def test_known_names_say_what_they_are_for():
    with refused("missing-file", "sdxl", "controlkit inspect sdxl"):
        load_base("sdxl")
    with refused("unknown-name", "sd16", "sd15"):
        load_base("sd16", random_weights=True)


@pytest.mark.parametrize("system", ["ctrlora-adapter", "controlnet-pairs"])
def test_training_from_pairs_is_the_same_verb(base, tmp_path, system):
    StableDiffusionXLPipeline(**parts(base)).save_pretrained(tmp_path / "xl")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (base.size, base.size, 3), np.uint8) for _ in range(5)]
    write_pairs(tmp_path / "pairs", ((255 - image, image, f"thing {n}") for n, image in enumerate(images)))
    (tmp_path / "run").mkdir()  # an adapter finds its base control beside it
    save_control(tmp_path / "run" / "shared.safetensors", BaseControlNet.for_base(base), base, dtype=torch.float32)
    own = {"control": str(tmp_path / "run" / "shared.safetensors"), "rank": 2} if system == "ctrlora-adapter" else {}
    where = {"base": str(tmp_path / "xl"), "pairs": str(tmp_path / "pairs"), "out": str(tmp_path / "run")}
    settings = {"name": "mine", "condition": "identity", "steps": 2, "batch_size": 2, "score_pictures": 1}
    recipe = build_recipe({"system": system, **own, **where, **settings, "device": "cpu"})
    assert run(recipe)
    control = load_control(tmp_path / "run" / "mine.safetensors", load_base(tmp_path / "xl"))
    assert any(parameter.abs().sum() > 0 for parameter in control.weights())


def test_guidance_is_diffusers_own_where_none_is_asked_for(base):
    own = inspect.signature(StableDiffusionXLPipeline.__call__).parameters["guidance_scale"].default
    assert base.default_guidance == own == 5.0


def test_the_autoencoder_stays_in_float32_where_it_is_xl_s_or_its_config_says_so(base, tiny_base):
    def held(given, **said):
        made = copy.deepcopy(given)
        settings = {
            key: value for key, value in given.vae.config.items() if key not in ("force_upcast",) and key[0] != "_"
        }
        made.vae = AutoencoderKL(**settings, **said)
        return made.to(dtype=torch.float16).vae.dtype

    assert held(tiny_base) == held(tiny_base, force_upcast=False) == torch.float16
    assert held(tiny_base, force_upcast=True) == torch.float32
    assert held(base) == held(base, force_upcast=True) == torch.float32
    assert held(base, force_upcast=False) == torch.float16


def test_a_folder_s_autoencoder_is_held_likewise(base_folder):
    file = base_folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    config.pop("force_upcast")
    file.write_text(json.dumps(config))
    loaded = load_base(base_folder, dtype=torch.float16)
    assert (loaded.vae.dtype, loaded.unet.dtype) == (torch.float16, torch.float16)
    file.write_text(json.dumps({**config, "force_upcast": True}))
    assert load_base(base_folder, dtype=torch.float16).vae.dtype == torch.float32


def test_of_a_repository_on_the_hub_only_the_folders_of_a_base_are_fetched():
    names = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer_2/vocab.json",
    ]
    names += ["text_encoder/model.safetensors", "scheduler/scheduler_config.json", "tokenizer/merges.txt"]
    others = ["realistic-v6.safetensors", "v1-5-pruned.ckpt", "sd_xl_base_1.0.safetensors", "README.md"]
    others += ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    others += ["vae_1_0/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors", "lora/a.safetensors"]
    rules = {"allow_patterns": _WANTED_FROM_HUB, "ignore_patterns": _UNWANTED_FROM_HUB}
    assert list(filter_repo_objects([*names, *others], **rules)) == names
