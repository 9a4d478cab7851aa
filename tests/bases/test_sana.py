"""Sana: images of diffusers, prompts after an instruction, its autoencoder, folders."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import SanaPipeline
from safetensors.torch import save_file

import tiny
from controlkit.bases.load import load_base
from controlkit.bases.meta import build_meta_base, meta_text, prompt_reader
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.sana import SANA_TOKENS, Sana, instruction
from controlkit.bases.schedules import SanaFlow
from controlkit.bases.taps import Tap
from controlkit.bases.text import TokenizedPrompts
from controlkit.formats.describe import describe_base
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts
from refusals import refused
from tiny import build_tiny_sana, parts_of, saved_pipeline

SHORT, LONG = "Cat", " red apple on a blue table, with many more words"
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_sana()


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "sana")


def theirs(base, prompts=(SHORT, LONG), **changes):
    pipeline = SanaPipeline(**parts_of(base))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt", "width": 64, "height": 64}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings |= {"use_resolution_binning": False, "negative_prompt": "", **changes}
    return pipeline(prompt=list(prompts), generator=generators, **settings).images


def ours(base, prompts=(SHORT, LONG), **changes):
    settings = {"seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=prompts, **{**settings, **changes})))


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 4), (96, 32, 3)])
@pytest.mark.parametrize("negative", ["", "Blurry, ugly"])
def test_images_are_those_of_diffusers(base, width, height, steps, negative):
    sizes = {"width": width, "height": height, "negative_prompt": negative}
    expected = theirs(base, num_inference_steps=steps, **sizes)
    made = ours(base, steps=steps, **sizes)
    assert made.shape == (2, 3, height, width)
    assert (made - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": "rms_norm_across_heads"}, {"timestep_scale": 0.5}, {"interpolation_scale": 1.0, "sample_size": 8}],
)
def test_other_transformers_make_the_images_of_diffusers(changes):
    base = build_tiny_sana(**changes)
    assert (ours(base) - theirs(base)).abs().max() < 1e-4


def test_images_depend_on_prompts_and_negative_prompts(base):
    first, second = ours(base)
    assert (first - second).abs().max() > 1e-2
    assert (ours(base, (SHORT,) * 2)[1] - second).abs().max() > 1e-4
    assert (ours(base, negative_prompt="ugly")[0] - first).abs().max() > 1e-4


def test_prompts_beyond_300_tokens_are_cut_as_by_diffusers(base):
    prompts = ("a" * 400, "b")
    assert (ours(base, prompts) - theirs(base, prompts)).abs().max() < 1e-4
    read = SANA_TOKENS - 2
    assert base.prompt_tokens == SANA_TOKENS
    assert base.cut_from("a" * read) == "" and base.cut_from("a" * read + "bc") == "bc"


def test_the_empty_prompt_is_read_without_the_instruction(base):
    text = base.encode_text(["", " ", SHORT])
    assert text["mask"].sum(1).tolist() == [1, 1, 2 + len(SHORT)]
    assert torch.equal(text.tokens[0], text.tokens[1])
    # The first token sees nothing else.
    assert torch.allclose(text.tokens[:, 0], text.tokens[:1, 0].expand(3, -1), atol=1e-5)
    negative = base.encode_text([SHORT], options=TextOptions(negative=True))
    assert negative["mask"].sum().item() == 1 + len(SHORT)
    assert "Enhanced" in instruction()


def test_an_image_becomes_latents_and_an_image(base):
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = base.encode_image(image)
    assert latents.shape == (2, 8, 8, 12)
    expected = base.vae.encode(image).latent * base.vae.config.scaling_factor
    assert torch.allclose(latents, expected, atol=1e-5)
    assert torch.allclose(base.encode_image(image, torch.randn_like(latents)), latents, atol=1e-5)
    decoded = base.vae.decode(latents / base.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(base.decode(latents), decoded, atol=1e-5)


def test_ids_of_a_data_worker_are_used(base):
    prompts = [SHORT, ""]
    known = TokenizedPrompts(["other"] * 2, base.tokenizers, base.tokenize(prompts))
    assert torch.equal(base.encode_text(known).tokens, base.encode_text(prompts).tokens)


def test_every_point_sees_the_stream_and_acts_on_it(base):
    x_t, t, text = torch.randn(2, 8, 4, 3), torch.tensor([500.0, 20.0]), base.encode_text([LONG, SHORT])
    seen = {}
    watch = {name: [Tap(function=lambda h, name=name: seen.update({name: h}))] for name in base.points}
    plain = base.predict(x_t, t, text, taps=watch)
    assert torch.equal(plain, base.predict(x_t, t, text))
    assert torch.equal(seen["time"], base.embed_time(x_t, t, text))
    assert {value.shape for name, value in seen.items() if name != "time"} == {(2, 12, 32)}
    assert torch.equal(seen["block.0"], seen["block.1.in"])
    for name in base.points:
        second = {name: [Tap(function=torch.sin, rows=(1, 2))]}
        changed = base.predict(x_t, t, text, taps=second)
        assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1], atol=1e-5), name


def test_residuals_are_added_to_the_image_tokens(base):
    x_t, t, text = torch.randn(1, 8, 8, 8), torch.tensor(500.0), base.encode_text([SHORT])
    added = torch.randn(1, 64, 32)
    expected = base.transformer(
        hidden_states=x_t,
        encoder_hidden_states=text.tokens,
        encoder_attention_mask=text["mask"],
        timestep=t.expand(1),
        controlnet_block_samples=(added, 2 * added),
    ).sample
    made = base.predict(x_t, t, text, Residuals({"block.1": added, "block.2": 2 * added}))
    assert torch.allclose(made, expected, atol=1e-5)


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_sana()
        torch.manual_seed(1)
        x_t, weight = torch.randn(1, 8, 4, 4), torch.full((32,), 0.1, requires_grad=True)
        if checkpointed:
            base.transformer.train()
            base.checkpoint_activations()
        taps = {name: [Tap(function=weight.mul)] for name in base.points if name != "time"}
        base.predict(x_t, torch.tensor([300.0]), base.encode_text([LONG]), taps=taps).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_a_folder_loads(base, folder):
    loaded = load_base(folder)
    assert isinstance(loaded, Sana) and loaded.size == 64 and loaded.default_guidance == 4.5
    assert (loaded.default_sampler, loaded.factor) == ("dpm++", 8)
    assert torch.allclose(ours(loaded), ours(base), atol=1e-5)
    assert prompt_reader(str(folder)).cut_from(SHORT) == ""


def test_one_with_the_scheduler_of_a_rectified_flow(base, folder):
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
    )
    assert torch.allclose(ours(load_base(folder)), ours(base), atol=1e-5)
    assert SanaFlow({}).shift == 1


def test_sprint_and_other_shapes_are_refused():
    with refused("unsupported", "Sprint", "Sana 1.5"):
        build_tiny_sana(guidance_embeds=True)
    with refused("unsupported", "reads 8 channels", "makes 16"):
        build_tiny_sana(out_channels=16)


def test_a_single_file_is_refused_in_words(tmp_path):
    for names in (["attention_y_norm.weight"], ["caption_norm.weight", "proj_out.weight"]):
        save_file({name: torch.zeros(2) for name in names}, tmp_path / "sana.safetensors")
        with refused("unsupported", tmp_path / "sana.safetensors", "diffusers folder"):
            load_base(tmp_path / "sana.safetensors")


def test_previews_are_refused_in_words(base):
    with refused("unsupported", "tiny-sana", "no matrix is known", "8 latent channels"):
        ours(base, on_step=lambda step: step.preview())


def test_its_own_autoencoder_is_replaced_by_one_of_its_kind(base, tmp_path):
    folder = saved_pipeline(base, tmp_path / "sana")
    assert torch.allclose(ours(load_base(folder, vae=str(folder / "vae"))), ours(base), atol=1e-5)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    with refused("incompatible", "scaling_factor 0.5", "0.41407"):
        load_base(saved_pipeline(base, tmp_path / "again"), vae=str(folder / "vae"))


@pytest.mark.parametrize(
    ("name", "transformer", "vae"),
    [("sana-600m", 591_747_872, 312_250_275), ("sana-1600m", 1_604_462_752, 312_250_275)],
)
def test_real_sizes_are_counted_without_weights(name, transformer, vae):
    facts = describe_base(name)
    assert facts["transformer"]["parameters"] == transformer
    assert facts["autoencoder"]["parameters"] == vae
    assert facts["text encoder"]["parameters"] == 2_614_341_888
    assert facts["own size"] == "1024 x 1024" and facts["prediction"] == "flow"


def test_what_it_is_told_on_meta_is_what_it_is_told(base):
    on_meta = meta_text(build_meta_base("tiny", Sana, tiny.SANA_PARTS))
    text = base.encode_text([SHORT])
    assert {name: value.shape for name, value in on_meta.named.items()} == {
        name: value.shape for name, value in text.named.items()
    }


def test_half_precision(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    assert ours(base).isfinite().all()


def test_the_time_embedding_is_that_of_the_network_under_autocast(base):
    x_t, t, text = torch.randn(1, 8, 4, 4), torch.tensor([737.3]), base.encode_text([SHORT])
    seen = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base.predict(x_t, t, text, taps={"time": [Tap(function=seen.append)]})
        assert torch.equal(seen[0], base.embed_time(x_t, t, text))


def test_generate_makes_an_image(folder):
    made = generate(GenerateRequest(base=str(folder), prompt=SHORT, steps=2, width=64, height=64))
    assert [each.image.size for each in made.images] == [(64, 64)]
