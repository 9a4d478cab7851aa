"""Z-Image: images and noise levels of diffusers, prompts of any length, folders, errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImagePipeline
from original_names import original_z_image
from safetensors.torch import save_file

import tiny
from controlkit.bases.load import base_files, load_base
from controlkit.bases.meta import build_meta_base, meta_base, meta_text, prompt_reader
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.bases.text import TokenizedPrompts
from controlkit.bases.z_image import ZImage, padded_length, patches, unpatched
from controlkit.formats.describe import describe_base
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts
from refusals import refused
from tiny import build_tiny_z_image, parts_of, saved_pipeline

SHORT, LONG = "cat", "red apple on a blue table, with so many words that it takes more than thirty-two tokens"
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_z_image()


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "z-image")


def theirs(base, prompts=(SHORT, LONG), **changes):
    """Images of diffusers' pipeline, whose guidance scale counts 1 less."""
    pipeline = ZImagePipeline(**parts_of(base))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "width": 64, "height": 64}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(
        list(prompts), negative_prompt=["dog"] * len(SEEDS), generator=generators, **{**settings, **changes}
    ).images


def ours(base, prompts=(SHORT, LONG), **changes):
    settings = {"seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "dog"}
    return torch.cat(list(sample_prompts(base, prompts=prompts, **{**settings, **changes})))


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 4), (80, 48, 4), (64, 64, 1)])
@pytest.mark.parametrize("prompts", [(SHORT, LONG), (LONG, LONG), (SHORT, "")])
def test_images_are_those_of_diffusers(base, prompts, width, height, steps):
    expected = theirs(base, prompts, width=width, height=height, num_inference_steps=steps)
    made = ours(base, prompts, width=width, height=height, steps=steps)
    assert made.shape == (2, 3, height, width)
    assert (made - expected).abs().max() < 1e-4


def test_the_noise_levels_of_dynamic_shifting():
    base = build_tiny_z_image()
    base.scheduler_config = {**base.scheduler_config, "use_dynamic_shifting": True}
    assert (ours(base, width=96, height=48) - theirs(base, width=96, height=48)).abs().max() < 1e-4


def test_guidance_is_off_for_turbo_alone(base):
    slow = build_tiny_z_image()
    slow.scheduler_config = {**slow.scheduler_config, "shift": 6.0}
    assert (base.default_guidance, slow.default_guidance) == (1.0, 5.0)
    assert (ours(base, guidance=None) - theirs(base, guidance_scale=0.0)).abs().max() < 1e-4


def test_tokens_are_patches_row_by_row_with_channels_last():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = patches(latents)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[:, 1].view(2, 2, 2, 3).permute(0, 3, 1, 2), latents[:, :, :2, 2:4])
    assert torch.equal(unpatched(tokens, 2, 3), latents)


def test_prompts_are_cut_to_what_one_of_them_needs(base):
    texts = [base.encode_text([SHORT]), base.encode_text([LONG, ""])]
    assert [text.tokens.shape[1] for text in texts] == [512, 512]
    lengths = [padded_length(text["mask"]).tolist() for text in texts]
    assert lengths == [[32], [128, 32]]
    first, second = base.fitted(*texts)
    assert first.tokens.shape[1] == second.tokens.shape[1] == 128 and "even" not in first
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    assert torch.allclose(base.predict(x_t, t, second), base.predict(x_t, t, texts[1]), atol=1e-5)
    (alone,) = base.fitted(texts[0])
    assert alone.tokens.shape[1] == 32 and "even" in alone  # needs no mask
    made, whole = (base.predict(x_t[:1], t[:1], text) for text in (alone, texts[0]))
    assert torch.allclose(made, whole, atol=1e-5)


def test_ids_of_a_data_worker_are_used(base):
    prompts = [SHORT, LONG]
    known = TokenizedPrompts(prompts, base.tokenizers, base.tokenize(prompts))
    assert torch.equal(base.encode_text(known).tokens, base.encode_text(prompts).tokens)


def test_what_a_row_reads_depends_on_its_prompt_alone(base):
    """Neither on the prompts beside it nor on the padding."""
    both, alone = base.encode_text([SHORT, LONG]), base.encode_text([SHORT])
    assert torch.allclose(both.tokens[:1], alone.tokens, atol=1e-5)
    assert torch.equal(both["mask"][:1], alone["mask"])


def test_every_point_sees_the_stream_and_acts_on_it(base):
    x_t, t, text = torch.randn(2, 4, 8, 6), torch.tensor([500.0, 20.0]), base.encode_text([LONG, SHORT])
    (text,) = base.fitted(text)
    seen = {}
    watch = {name: [Tap(function=lambda h, name=name: seen.update({name: h}))] for name in base.points}
    plain = base.predict(x_t, t, text, taps=watch)
    assert torch.equal(plain, base.predict(x_t, t, text))
    assert torch.allclose(seen["time"], base.embed_time(x_t, t, text), atol=1e-5)
    for name in base.points:
        if name != "time":  # 12 image tokens are padded to 32, and 128 are of the longer prompt
            assert seen[name].shape == (2, 32 if name.startswith("refiner") else 160, 32)
    assert torch.equal(seen["refiner.0"], seen["refiner.1.in"]) and torch.equal(seen["layer.2"], seen["layer.3.in"])
    for name in base.points:
        second = {name: [Tap(function=torch.sin, rows=(1, 2))]}
        changed = base.predict(x_t, t, text, taps=second)
        assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1], atol=1e-5), name


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_z_image()
        torch.manual_seed(1)
        x_t, weight = torch.randn(1, 4, 8, 8), torch.full((32,), 0.1, requires_grad=True)
        if checkpointed:
            base.transformer.train()
            base.checkpoint_activations()
        taps = {name: [Tap(function=weight.mul)] for name in base.points if name != "time"}
        base.predict(x_t, torch.tensor([300.0]), base.encode_text([LONG]), taps=taps).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_residuals_have_no_site(base):
    with refused("incompatible", "'middle'"):
        base.predict(
            torch.zeros(1, 4, 8, 8), torch.zeros(1), base.encode_text([""]), Residuals({"middle": torch.zeros(1)})
        )


def test_a_folder_loads(base, folder):
    loaded = load_base(folder)
    assert isinstance(loaded, ZImage)
    assert loaded.fingerprint == base.fingerprint and loaded.content == load_base(folder).content
    assert torch.equal(ours(loaded), ours(base))
    made = generate(GenerateRequest(prompt=LONG, base=str(folder), steps=2, seeds=(3,)))
    assert made.used["sampler"] == "euler" and made.used["guidance"] == 1.0
    assert made.images[0].image.size == (64, 64)


def test_sizes_that_do_not_fit(base):
    base.check_size(96, 16)
    with refused("wrong-size", "width 72", "multiple of 16"):
        base.check_size(72, 64)
    with refused("wrong-size", "528", "512"):
        base.check_size(64, 528)


def test_what_it_does_not_read_of_a_prompt_is_told(base):
    """The chat template takes 6 of the 512 tokens before the prompt."""
    assert base.prompt_tokens == 512 and not base.cut_from(LONG)
    assert base.cut_from("a" * 506) == "" and base.cut_from("a" * 506 + "bc") == "bc"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_takes_the_other_parts_from_the_folder_beside_it(base, prefix, tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file(
        {f"{prefix}{name}": value.contiguous() for name, value in original_z_image(base.transformer).items()}, file
    )
    with refused("missing-file", file, "transformer of z-image alone", "text_encoder", "vae", tmp_path / "mine"):
        load_base(file)
    folder = saved_pipeline(base, tmp_path / "mine")
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    loaded = load_base(file)
    assert loaded.fingerprint == base.fingerprint
    assert torch.equal(ours(loaded), ours(base))
    assert prompt_reader(str(file)).prompt_tokens == 512
    read = {path.relative_to(tmp_path).as_posix() for path in base_files(file)}
    assert {"mine.safetensors", "mine/vae/diffusion_pytorch_model.safetensors", "mine/tokenizer/tokenizer.json"} < read
    facts = describe_base(str(file))
    assert facts["transformer"]["parameters"] == sum(value.numel() for value in base.transformer.parameters())


def test_real_sizes_are_counted_without_weights():
    facts = describe_base("z-image-turbo")
    assert facts["transformer"]["parameters"] == 6_154_908_736
    assert facts["text encoder"]["parameters"] == 4_022_468_096
    assert facts["own size"] == "1024 x 1024" and facts["prediction"] == "flow"


def test_what_it_is_told_on_meta_is_what_it_is_told(base):
    on_meta = meta_text(build_meta_base("tiny", ZImage, tiny.Z_IMAGE_PARTS))
    told = base.encode_text([SHORT])
    assert {name: value.shape for name, value in on_meta.named.items()} == {
        name: value.shape for name, value in told.named.items()
    }
    assert {meta_base(name).architecture for name in ZImage.known} == {"z-image"}


def test_half_precision(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    assert base.encode_text([SHORT]).tokens.dtype == torch.bfloat16
    assert ours(base).isfinite().all()
