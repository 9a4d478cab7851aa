"""FLUX.2 (dev, klein): images and noise levels of diffusers, prompts with their padding, its autoencoder, files."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from original_names import original_flux2
from safetensors.torch import save_file

import tiny
from controlkit.bases.flux2 import Flux2, Flux2Base, Flux2Klein
from controlkit.bases.load import base_files, load_base
from controlkit.bases.meta import build_meta_base, meta_base, meta_text, prompt_reader
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.bases.text import TokenizedPrompts
from controlkit.formats.describe import describe_base
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.start_image import StartImage
from refusals import refused
from tiny import build_tiny_flux2, build_tiny_flux2_klein, parts_of, saved_pipeline

SHORT, LONG = "cat", "red apple on a blue table, with many more words"
SEEDS = (3, 11)
PIPELINES = {"dev": Flux2Pipeline, "klein": Flux2KleinPipeline}


@pytest.fixture(scope="module")
def dev():
    return build_tiny_flux2()


@pytest.fixture(scope="module")
def klein():
    return build_tiny_flux2_klein()


@pytest.fixture(params=["dev", "klein"])
def model(request):
    return request.param


@pytest.fixture
def base(model, request):
    return request.getfixturevalue(model)


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "flux2")


def theirs(base, prompts=(SHORT, LONG), **changes):
    kind = Flux2Pipeline if isinstance(base, Flux2) else Flux2KleinPipeline
    pipeline = kind(**parts_of(base))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt", "width": 64, "height": 64}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(prompt=list(prompts), generator=generators, **{**settings, **changes}).images


def ours(base, prompts=(SHORT, LONG), **changes):
    settings = {"seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=prompts, **{**settings, **changes})))


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 4), (96, 48, 3)])
@pytest.mark.parametrize("prompts", [(SHORT, LONG), (SHORT, "")])
def test_images_are_those_of_diffusers(base, prompts, width, height, steps):
    expected = theirs(base, prompts, width=width, height=height, num_inference_steps=steps)
    made = ours(base, prompts, width=width, height=height, steps=steps)
    assert made.shape == (2, 3, height, width)
    assert (made - expected).abs().max() < 1e-4


def test_images_depend_on_what_they_should(base):
    """Else the comparison with diffusers would say little."""
    made = ours(base)
    for other in (ours(base, (LONG, LONG)), ours(base, guidance=2.0)):
        assert (made - other).abs().max() > 0.01


def test_noise_levels_of_large_images_are_those_of_diffusers(base):
    for side, steps in ((1024, 28), (1536, 4), (512, 1)):
        solver = base.schedule_for(side, side).solver("euler", steps, "cpu", "x")
        (own,) = (part["scheduler"] for part in [parts_of(base)])
        own.set_timesteps(
            sigmas=[1 - step / steps for step in range(steps)], mu=compute_empirical_mu((side // 16) ** 2, steps)
        )
        assert torch.allclose(torch.as_tensor(solver.timesteps).float(), own.timesteps, rtol=1e-5)


def test_prompts_beyond_512_tokens_are_cut_as_by_diffusers(base):
    prompts = ("a" * 900, "b" * 500)
    assert (ours(base, prompts, steps=2) - theirs(base, prompts, num_inference_steps=2)).abs().max() < 1e-4


def test_a_prompt_with_the_name_of_the_image_token_is_read_as_by_diffusers(dev):
    prompts = ("a [IMG] cat", SHORT)
    assert (ours(dev, prompts, steps=2) - theirs(dev, prompts, num_inference_steps=2)).abs().max() < 1e-4


def test_an_image_becomes_latents_and_an_image(base):
    x = torch.rand(2, 3, 48, 64) * 2 - 1
    pipeline = PIPELINES["dev" if isinstance(base, Flux2) else "klein"](**parts_of(base))
    z = base.encode_image(x)
    assert z.shape == (2, 16, 3, 4)
    assert torch.allclose(z, pipeline._encode_vae_image(x, None), atol=1e-5)
    unpacked = pipeline._unpatchify_latents(base.unscaled(z))
    assert torch.allclose(base.decode(z), base.vae.decode(unpacked).sample.clamp(-1, 1), atol=1e-5)
    posterior, noise = base.vae.encode(x).latent_dist, torch.randn(2, 16, 3, 4)
    drawn = pipeline._patchify_latents(posterior.mean)
    drawn = drawn + pipeline._patchify_latents(posterior.std) * noise
    assert torch.allclose(base.encode_image(x, noise), base.scaled(drawn), atol=1e-5)


def test_ids_of_a_data_worker_are_used(base):
    prompts = [SHORT, LONG]
    (ids,) = base.tokenize(prompts)
    assert ids.shape == (2, 512)
    known = TokenizedPrompts(prompts, base.tokenizers, (ids,))
    assert torch.equal(base.encode_text(known).tokens, base.encode_text(prompts).tokens)


def test_every_point_sees_the_stream_and_acts_on_it(base):
    x_t, t, text = torch.randn(2, 16, 4, 3), torch.tensor([500.0, 20.0]), base.encode_text([LONG, SHORT])
    seen = {}
    watch = {name: [Tap(function=lambda h, name=name: seen.update({name: h}))] for name in base.points}
    plain = base.predict(x_t, t, text, taps=watch)
    assert torch.equal(plain, base.predict(x_t, t, text))
    assert torch.allclose(seen["time"], base.embed_time(x_t, t, text), atol=1e-5)
    for name in base.points:
        if name != "time":
            assert seen[name].shape == (2, 12 if name.startswith("block") else 524, 32)
    assert torch.equal(seen["block.0"], seen["block.1.in"]) and torch.equal(seen["single.0"], seen["single.1.in"])
    for name in base.points:
        second = {name: [Tap(function=torch.sin, rows=(1, 2))]}
        changed = base.predict(x_t, t, text, taps=second)
        assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1], atol=1e-5), name


def test_residuals_are_added_to_the_image_tokens(base):
    x_t, t, text = torch.randn(1, 16, 4, 4), torch.tensor([500.0]), base.encode_text([SHORT])
    added = torch.randn(1, 16, 32)
    made = base.predict(x_t, t, text, Residuals({"block.1": added}))
    assert torch.equal(made, base.predict(x_t, t, text, taps={"block.1": [Tap(function=lambda _: added)]}))
    with refused("incompatible", "'middle'"):
        base.predict(x_t, t, text, Residuals({"middle": torch.zeros(1)}))


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_flux2()
        torch.manual_seed(1)
        x_t, weight = torch.randn(1, 16, 4, 4), torch.full((32,), 0.1, requires_grad=True)
        if checkpointed:
            base.transformer.train()
            base.checkpoint_activations()
        taps = {name: [Tap(function=weight.mul)] for name in base.points if name != "time"}
        base.predict(x_t, torch.tensor([300.0]), base.encode_text([LONG]), taps=taps).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_a_folder_loads(base, folder):
    loaded = load_base(folder)
    assert type(loaded) is type(base)
    assert loaded.fingerprint == base.fingerprint and loaded.content == load_base(folder).content
    assert torch.equal(ours(loaded), ours(base))
    made = generate(GenerateRequest(prompt=LONG, base=str(folder), steps=2, seeds=(3,), width=64, height=48))
    assert made.used["sampler"] == "euler" and made.used["guidance"] == 4.0
    assert made.images[0].image.size == (64, 48)


def test_a_distilled_klein_needs_no_guidance(tmp_path):
    base = build_tiny_flux2_klein(is_distilled=True)
    folder = saved_pipeline(base, tmp_path / "klein")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    loaded = load_base(folder)
    assert isinstance(loaded, Flux2Klein) and loaded.default_guidance == 1.0
    assert (ours(loaded, guidance=1.0) - theirs(loaded, guidance_scale=1.0)).abs().max() < 1e-4


def test_other_statistics_of_latents_are_another_model(base, folder):
    other = load_base(folder)
    other.vae.bn.running_var.mul_(2)
    assert other.fingerprint == base.fingerprint and other.content != base.content


def test_its_own_autoencoder_is_replaced_by_one_of_its_kind(klein, tmp_path):
    folder = saved_pipeline(klein, tmp_path / "klein")
    other = build_tiny_flux2(seed=5).vae
    other.bn.load_state_dict(klein.vae.bn.state_dict())
    other.save_pretrained(tmp_path / "vae")
    loaded = load_base(folder, vae=str(tmp_path / "vae"))
    assert torch.equal(loaded.vae.encoder.conv_in.weight, other.encoder.conv_in.weight)
    other.bn.running_mean.add_(1)
    other.save_pretrained(tmp_path / "vae")
    with refused("incompatible", "running_mean"):
        load_base(folder, vae=str(tmp_path / "vae"))


def test_a_preview_has_a_pixel_for_each_position_of_the_autoencoder(base):
    """Of a base with the 32 channels of FLUX.2's autoencoder, which the tiny ones have not."""
    previews = []
    base.defaults["latent_rgb"] = [(0.1, 0.2, 0.3)] * 4
    try:
        ours(base, (SHORT,), seeds=(3,), steps=2, width=96, on_step=lambda step: previews.extend(step.preview()))
    finally:
        del base.defaults["latent_rgb"]
    assert {image.size for image in previews} == {(12, 8)} and len(previews) == 2


def test_sizes_that_do_not_fit(base):
    base.check_size(96, 16)
    with refused("wrong-size", "width 72", "multiple of 16"):
        base.check_size(72, 64)


def test_an_autoencoder_of_other_channels_is_refused():
    with refused("unsupported", "reads 64 channels", "makes 16"):
        build_tiny_flux2(in_channels=64)


def test_a_text_encoder_of_another_width_is_refused():
    with refused("unsupported", "96 channels", "make 48"):
        build_tiny_flux2_klein(joint_attention_dim=96)


@pytest.mark.parametrize("build", [build_tiny_flux2, build_tiny_flux2_klein])
def test_layers_of_the_text_encoder_that_are_not_read_do_not_run(build, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Flux2Base, "_leave_out_unread_layers", lambda base: None)
        whole = build(text_layers=34)
    expected = theirs(whole)
    base = load_base(saved_pipeline(whole, tmp_path / "whole"))
    assert len(whole.language_model().layers) == 34
    assert len(base.language_model().layers) == max(base.text_layers) + 1
    assert (ours(base) - expected).abs().max() < 1e-4
    again = load_base(saved_pipeline(base, tmp_path / "again"))
    assert torch.equal(ours(again), ours(base))


def test_a_text_encoder_with_too_few_layers_is_refused():
    with refused("unsupported", "20 layers", "at least 31", "10, 20, 30"):
        build_tiny_flux2(text_layers=20)


@pytest.mark.parametrize(("kind", "distilled"), [("Flux2KleinPipeline", False), ("Flux2KleinKVPipeline", True)])
def test_whether_klein_is_distilled_if_its_index_does_not_say(kind, distilled, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert Flux2Klein.settings_in(tmp_path) == {"is_distilled": distilled}


def test_a_tokenizer_that_lies_in_a_processor_s_folder_is_read(dev, tmp_path):
    """As in the released dev, whose index names PixtralProcessor, which needs torchvision."""
    folder = saved_pipeline(dev, tmp_path / "dev")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    preprocessor = {"image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor"}
    (folder / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert torch.equal(ours(load_base(folder)), ours(dev))


def test_what_it_does_not_read_of_a_prompt_is_told(base):
    assert base.prompt_tokens == 512 and not base.cut_from(LONG)
    before = base.chat("\0").partition("\0")[0]
    read = 512 - len(base.tokenizer(before, add_special_tokens=False).input_ids)
    assert base.cut_from("a" * read) == "" and base.cut_from("a" * read + "bc") == "bc"


def test_a_single_file_takes_the_other_parts_from_the_folder_beside_it(base, model, tmp_path):
    file, known = tmp_path / "mine.safetensors", "flux2-dev" if model == "dev" else "flux2-klein-4b"
    save_file(original_flux2(base.transformer), file)
    with refused("missing-file", file, f"transformer of {known} alone", "text_encoder", "vae", tmp_path / "mine"):
        load_base(file)
    folder = saved_pipeline(base, tmp_path / "mine")
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    loaded = load_base(file)
    assert type(loaded) is type(base) and loaded.fingerprint == base.fingerprint
    assert torch.equal(ours(loaded), ours(base))
    assert prompt_reader(str(file)).prompt_tokens == 512
    read = {path.relative_to(tmp_path).as_posix() for path in base_files(file)}
    assert {"mine.safetensors", "mine/vae/diffusion_pytorch_model.safetensors", "mine/tokenizer/tokenizer.json"} < read


def test_a_file_under_the_names_of_a_whole_model_is_refused(base, tmp_path):
    tensors = {f"model.diffusion_model.{name}": value for name, value in original_flux2(base.transformer).items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    with refused("unsupported", tmp_path / "mine.safetensors", "whole model", "FLUX.2", "transformer alone"):
        load_base(tmp_path / "mine.safetensors")


def test_a_single_file_without_a_weight_is_refused(base, tmp_path):
    saved_pipeline(base, tmp_path / "mine")
    tensors = original_flux2(base.transformer)
    del tensors["single_blocks.1.linear2.weight"]
    save_file(tensors, tmp_path / "mine.safetensors")
    with refused("damaged-file", tmp_path / "mine.safetensors"):
        load_base(tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder"),
    [
        ("flux2-dev", 32_223_281_152, 19_009_561_600),
        ("flux2-klein-4b", 3_875_544_576, 3_215_021_568),
        ("flux2-klein-9b", 9_078_581_248, 6_647_163_904),
    ],
)
def test_real_sizes_are_counted_without_weights(name, transformer, text_encoder):
    facts = describe_base(name)
    assert facts["transformer"]["parameters"] == transformer
    assert facts["text encoder"]["parameters"] == text_encoder
    assert facts["own size"] == "1024 x 1024" and facts["prediction"] == "flow"


def test_what_it_is_told_on_meta_is_what_it_is_told(base, model):
    parts = tiny.FLUX2_DEV_PARTS if model == "dev" else tiny.FLUX2_KLEIN_PARTS
    on_meta = meta_text(build_meta_base("tiny", type(base), parts))
    told = base.encode_text([SHORT])
    assert {name: value.shape for name, value in on_meta.named.items()} == {
        name: value.shape for name, value in told.named.items()
    }
    assert {meta_base(name).architecture for name in type(base).known} == {base.architecture}


def test_half_precision(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    assert base.encode_text([SHORT]).tokens.dtype == torch.bfloat16
    assert ours(base).isfinite().all()


def test_the_time_embedding_is_that_of_the_network_under_autocast(base):
    """Which controls within the base's pass read in training."""
    x_t, t, text = torch.randn(1, 16, 4, 4), torch.tensor([737.3]), base.encode_text([SHORT])
    seen = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base.predict(x_t, t, text, taps={"time": [Tap(function=seen.append)]})
        assert torch.equal(seen[0], base.embed_time(x_t, t, text))


@pytest.mark.parametrize("masked", [False, True])
def test_it_starts_from_an_image(base, masked):
    """diffusers' only pipeline that does, `Flux2KleinInpaintPipeline`, also reads the image as a reference, so images
    are compared with steps of its scheduler."""
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask, steps, first = torch.zeros(1, 1, 64, 64), 4, 2
    mask[..., 32:] = 1
    start = StartImage(pixels=pixels, strength=0.5, mask=mask if masked else None)
    made = ours(base, (SHORT,), seeds=(3,), steps=steps, guidance=1.0, start=start)

    scheduler, generator = parts_of(base)["scheduler"], torch.Generator().manual_seed(3)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=compute_empirical_mu(16, steps))
    scheduler.set_begin_index(first)
    z = base.encode_image(pixels, torch.randn(1, 16, 4, 4, generator=generator))
    noise = torch.randn(1, 16, 4, 4, generator=generator)
    x_t = scheduler.scale_noise(z, scheduler.timesteps[first : first + 1], noise)
    kept = torch.zeros(1, 1, 4, 4)
    kept[..., :2] = 1.0 if masked else 0.0
    (text,) = base.fitted(base.encode_text([SHORT]))
    text = base.guided(text, 1.0)
    for place, t in enumerate(scheduler.timesteps[first:], first + 1):
        x_t = scheduler.step(base.predict(x_t, t[None], text), t, x_t, return_dict=False)[0]
        last = place == steps
        outside = z if last else scheduler.scale_noise(z, scheduler.timesteps[place : place + 1], noise)
        x_t = kept * outside + (1 - kept) * x_t
    assert torch.allclose(made, (base.decode(x_t) + 1) / 2, atol=1e-4)
