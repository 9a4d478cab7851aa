"""FLUX.1: images, residuals and noise levels of diffusers, folders, guidance that the network reads, errors."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from original_names import original_flux
from safetensors.torch import save_file

import tiny
from controlkit.bases.flux import USUAL_GUIDANCE, Flux, pack, positions, unpack
from controlkit.bases.load import load_base
from controlkit.bases.meta import build_meta_base, meta_base, meta_text
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import RectifiedFlow
from controlkit.bases.taps import Tap
from controlkit.formats.describe import describe_base
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from refusals import refused
from tiny import build_tiny_flux, build_tiny_sd3, parts_of, saved_pipeline

PROMPT, SEEDS = "red apple on a blue table", (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_flux()


@pytest.fixture(scope="module")
def schnell():
    return build_tiny_flux(guidance_embeds=False)


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "flux")


def theirs(base, pipeline=FluxPipeline, **changes):
    """Images of diffusers' pipeline."""
    made = pipeline(**parts_of(base))
    made.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt", "width": 64, "height": 64}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return made([PROMPT] * len(SEEDS), generator=generators, **{**settings, **changes}).images


def ours(base, **changes):
    settings = {"prompt": PROMPT, "seeds": SEEDS, "steps": 4, "guidance": 4.0}
    return torch.cat(list(sample(base, **{**settings, **changes})))


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 4), (96, 48, 4), (64, 64, 1)])
def test_images_are_those_of_diffusers(base, width, height, steps):
    expected = theirs(base, width=width, height=height, num_inference_steps=steps)
    made = ours(base, width=width, height=height, steps=steps)
    assert made.shape == (2, 3, height, width)
    assert (made - expected).abs().max() < 1e-3


def test_the_network_reads_the_guidance_scale(base):
    assert base.default_guidance == USUAL_GUIDANCE
    made = ours(base, guidance=1.0)
    assert (made - theirs(base, guidance_scale=1.0)).abs().max() < 1e-3
    assert (made - ours(base, guidance=9.0)).abs().max() > 1e-3
    assert torch.equal(made, ours(base, guidance=1.0, negative_prompt="cat"))


def test_without_it_guidance_is_off_by_default_and_else_true_cfg(schnell):
    assert schnell.default_guidance == 1.0
    assert (ours(schnell, guidance=None) - theirs(schnell)).abs().max() < 1e-3
    expected = theirs(schnell, true_cfg_scale=4.0, negative_prompt=["cat"] * len(SEEDS))
    assert (ours(schnell, negative_prompt="cat") - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_other_solvers_have_the_shift_of_the_size(base, name):
    plain, large = (base.schedule_for(side, side).solver(name, 8, "cpu", "base") for side in (64, 1024))
    assert (large.timesteps[1:] > plain.timesteps[1:]).all()
    assert ours(base, sampler=name).isfinite().all()


def test_noise_levels_of_stable_diffusion_3_with_dynamic_shifting():
    base = build_tiny_sd3(t5=False)
    base.scheduler_config = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}
    expected = theirs(base, StableDiffusion3Pipeline, width=96, height=48)
    assert (ours(base, width=96, height=48) - expected).abs().max() < 1e-3


def test_shift_of_each_kind_and_none_in_training():
    config = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}
    schedule = RectifiedFlow(config)
    # 0.5 at 256 tokens and 1.15 at 4096 (black-forest-labs/flux, sampling.py, `get_schedule`).
    shifts = [schedule.for_tokens(count).shift for count in (256, 4096)]
    assert shifts == pytest.approx([math.exp(0.5), math.exp(1.15)])
    assert RectifiedFlow({**config, "time_shift_type": "linear"}).for_tokens(4096).shift == pytest.approx(1.15)
    static = RectifiedFlow({**config, "use_dynamic_shifting": False})
    assert static.for_tokens(4096) is static and (schedule.shift, static.shift) == (1.0, 3.0)
    times = schedule.draw_times(4000, torch.Generator().manual_seed(0))
    assert float(times.median()) == pytest.approx(500, abs=20)


def test_tokens_are_patches_row_by_row():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12) and torch.equal(tokens[:, 1].view(2, 3, 2, 2), latents[:, :, :2, 2:4])
    assert torch.equal(unpack(tokens, 2, 3), latents)
    assert positions(latents).tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def test_a_folder_loads(base, folder):
    loaded = load_base(folder)
    assert isinstance(loaded, Flux)
    assert loaded.fingerprint == base.fingerprint and loaded.content == load_base(folder).content
    assert torch.equal(ours(loaded), ours(base))
    request = GenerateRequest(prompt=PROMPT, negative_prompt="cat", base=str(folder), steps=2, seeds=(3,))
    made = generate(request)
    assert made.used["sampler"] == "euler" and made.used["guidance"] == 3.5
    assert made.images[0].image.size == (64, 64)
    assert any("no branch for a negative prompt" in note for note in made.notes)


def test_residuals_are_those_of_diffusers(base):
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([500.0, 20.0])
    text = base.encode_text([PROMPT, "cat"])
    double, single = ([torch.randn(2, 16, 16, generator=generator) for _ in range(count)] for count in (3, 4))
    expected = base.transformer(
        pack(x_t),
        timestep=t / 1000,
        guidance=torch.full((2,), 3.5),
        encoder_hidden_states=text.tokens,
        pooled_projections=text["pooled"],
        img_ids=positions(x_t),
        txt_ids=torch.zeros(512, 3),
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        return_dict=False,
    )[0]
    assert list(base.sites) == ["block.0", "block.1", "block.2", "single.0", "single.1", "single.2", "single.3"]
    made = base.predict(x_t, t, text, Residuals.numbered("block", double) + Residuals.numbered("single", single))
    assert torch.allclose(pack(made), expected, atol=1e-5)
    assert not torch.allclose(made, base.predict(x_t, t, text), atol=1e-2)
    with refused("incompatible", "'single.4'"):
        base.predict(x_t, t, text, Residuals({"single.4": single[0]}))


def test_every_point_sees_the_stream_and_acts_on_it(base):
    x_t, t, text = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), base.encode_text([PROMPT, "cat"])
    seen = {}
    watch = {name: [Tap(function=lambda h, name=name: seen.update({name: h}))] for name in base.points}
    plain = base.predict(x_t, t, text, taps=watch)
    assert torch.equal(plain, base.predict(x_t, t, text))
    assert torch.allclose(seen["time"], base.embed_time(x_t, t, text), atol=1e-5)
    assert all(seen[name].shape == (2, 16, 16) for name in base.points if name != "time")
    assert torch.equal(seen["block.0"], seen["block.1.in"]) and torch.equal(seen["block.2"], seen["single.0.in"])
    for name in base.points:
        second = {name: [Tap(function=torch.sin, rows=(1, 2))]}
        changed = base.predict(x_t, t, text, taps=second)
        assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1], atol=1e-5), name


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_flux()
        torch.manual_seed(1)
        x_t, weight = torch.randn(1, 4, 8, 8), torch.full((16,), 0.1, requires_grad=True)
        if checkpointed:
            base.transformer.train()
            base.checkpoint_activations()
        taps = {name: [Tap(function=weight.mul)] for name in base.sites}
        base.predict(x_t, torch.tensor([300.0]), base.encode_text([PROMPT]), taps=taps).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_sizes_that_do_not_fit(base):
    base.check_size(96, 16)
    with refused("wrong-size", "width 72", "multiple of 16"):
        base.check_size(72, 64)


def test_what_it_does_not_read_of_a_prompt_is_told(base):
    assert base.prompt_tokens == 512
    assert base.cut_from("a " * 600).split() == ["a"] * 89 and not base.cut_from(PROMPT)


@pytest.fixture
def of_tiny_width(monkeypatch):
    """diffusers' conversion with the width of the tiny base, in place of FLUX.1's, which is a constant there."""
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    narrow = code.replace(co_consts=tuple(16 if value == 3072 else value for value in code.co_consts))
    monkeypatch.setattr(convert_flux_transformer_checkpoint_to_diffusers, "__code__", narrow)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_takes_the_other_parts_from_the_folder_beside_it(base, prefix, tmp_path, of_tiny_width):
    file = tmp_path / "mine.safetensors"
    save_file({f"{prefix}{name}": value.contiguous() for name, value in original_flux(base.transformer).items()}, file)
    with refused("missing-file", file, "transformer of flux1-dev alone", "text_encoder", "vae", tmp_path / "mine"):
        load_base(file)
    folder = saved_pipeline(base, tmp_path / "mine")
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    loaded = load_base(file)
    assert loaded.fingerprint == base.fingerprint
    assert torch.equal(ours(loaded), ours(base))
    facts = describe_base(str(file))
    assert facts["transformer"]["parameters"] == sum(value.numel() for value in base.transformer.parameters())


def test_the_folder_of_another_model_beside_a_file_is_refused(schnell, tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file({name: value.contiguous() for name, value in original_flux(schnell.transformer).items()}, file)
    saved_pipeline(build_tiny_flux(), tmp_path / "mine")
    with refused("contradiction", file, "guidance_embeds True", tmp_path / "mine" / "transformer"):
        load_base(file)


@pytest.mark.parametrize("channels", [32, 96])
def test_models_that_read_a_condition_or_a_mask_are_refused(channels, tmp_path):
    """FLUX.1 Canny, Depth and Fill: their latents have further channels."""
    folder = saved_pipeline(build_tiny_flux(in_channels=channels, out_channels=16), tmp_path / "flux")
    with refused("unsupported", folder, f"{channels // 4} channels"):
        load_base(folder)


def test_real_sizes_are_counted_without_weights():
    facts = describe_base("flux1-dev")
    assert facts["transformer"]["parameters"] == 11_901_408_320
    assert facts["autoencoder"]["parameters"] == 83_819_683
    assert facts["text encoder 2"]["parameters"] == 4_762_310_656
    assert facts["own size"] == "1024 x 1024" and facts["prediction"] == "flow"


def test_what_it_is_told_on_meta_is_what_it_is_told(base):
    on_meta = meta_text(build_meta_base("tiny", Flux, tiny.FLUX_PARTS))
    told = base.encode_text([PROMPT])
    assert {name: value.shape for name, value in on_meta.named.items()} == {
        name: value.shape for name, value in told.named.items()
    }
    assert [meta_base(name).architecture for name in Flux.known] == ["flux-1-dev", "flux-1-schnell"]


def test_its_size_is_that_of_its_own_autoencoder(base, folder, tmp_path):
    other = AutoencoderKL.from_config({**base.vae.config, "sample_size": 32})
    other.save_pretrained(tmp_path / "vae")
    replaced = load_base(folder, vae=str(tmp_path / "vae"))
    assert replaced.vae.config.sample_size == 32 and replaced.size == base.size == 64


def test_half_precision(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    assert base.encode_text([PROMPT])["guidance"].dtype == torch.bfloat16
    assert ours(base).isfinite().all()
