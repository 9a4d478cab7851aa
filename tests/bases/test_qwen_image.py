"""Qwen-Image: images and noise levels of diffusers, prompts of any length, its autoencoder, folders, errors."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

import tiny
from controlkit.bases.load import base_files, load_base
from controlkit.bases.meta import build_meta_base, meta_base, meta_text, prompt_reader
from controlkit.bases.qwen_image import TEMPLATE_TOKENS, QwenImage
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.bases.text import TokenizedPrompts
from controlkit.formats.describe import describe_base
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts
from refusals import refused
from tiny import build_tiny_qwen_image, parts_of, saved_pipeline

SHORT, LONG = "cat", "red apple on a blue table, with many more words"
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_qwen_image()


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "qwen-image")


def theirs(base, prompts=(SHORT, LONG), **changes):
    pipeline = QwenImagePipeline(**parts_of(base))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "true_cfg_scale": 4.0, "output_type": "pt", "width": 64, "height": 64}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(
        list(prompts), negative_prompt=["dog"] * len(SEEDS), generator=generators, **{**settings, **changes}
    ).images


def ours(base, prompts=(SHORT, LONG), **changes):
    settings = {"seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "dog", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=prompts, **{**settings, **changes})))


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 4), (96, 48, 3)])
@pytest.mark.parametrize("prompts", [(SHORT, LONG), (LONG, LONG), (SHORT, "")])
def test_images_are_those_of_diffusers(base, prompts, width, height, steps):
    expected = theirs(base, prompts, width=width, height=height, num_inference_steps=steps)
    made = ours(base, prompts, width=width, height=height, steps=steps)
    assert made.shape == (2, 3, height, width)
    assert (made - expected).abs().max() < 1e-4


def test_images_depend_on_what_they_should(base):
    """Else the comparison with diffusers would say little."""
    made = ours(base)
    for other in (ours(base, (LONG, LONG)), ours(base, negative_prompt="sky"), ours(base, guidance=3.0)):
        assert (made - other).abs().max() > 0.01


def test_without_guidance(base):
    assert (ours(base, guidance=1.0) - theirs(base, true_cfg_scale=1.0)).abs().max() < 1e-4


def test_one_step(base):
    """diffusers divides by zero: the last of one step is also the first."""
    assert ours(base, steps=1).isfinite().all()


def test_prompts_beyond_512_tokens_are_cut_as_by_diffusers(base):
    prompts = ("a" * 900, "b" * 500)
    assert (ours(base, prompts, steps=2) - theirs(base, prompts, num_inference_steps=2)).abs().max() < 1e-4


def test_an_image_becomes_latents_and_an_image(base):
    x = torch.rand(2, 3, 48, 64) * 2 - 1
    posterior = base.vae.encode(x[:, :, None]).latent_dist
    mean, deviation = (torch.tensor(base.vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    z = base.encode_image(x)
    assert z.shape == (2, 4, 6, 8)
    assert torch.allclose(z, (posterior.mode()[:, :, 0] - mean) / deviation, atol=1e-6)
    decoded = base.vae.decode((z * deviation + mean)[:, :, None]).sample[:, :, 0].clamp(-1, 1)
    assert torch.allclose(base.decode(z), decoded, atol=1e-5)
    noise = torch.randn(2, 4, 6, 8)
    drawn = posterior.mean + posterior.std * noise[:, :, None]
    assert torch.allclose(base.encode_image(x, noise), (drawn[:, :, 0] - mean) / deviation, atol=1e-5)
    assert isinstance(posterior, DiagonalGaussianDistribution)


def test_prompts_are_cut_to_what_one_of_them_needs(base):
    texts = [base.encode_text([SHORT]), base.encode_text([LONG, ""])]
    assert [text.tokens.shape[1] for text in texts] == [512, 512]
    first, second = base.fitted(*texts)
    assert first.tokens.shape[1] == second.tokens.shape[1] < 512 and "even" not in first
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    assert torch.allclose(base.predict(x_t, t, second), base.predict(x_t, t, texts[1]), atol=1e-5)
    (alone,) = base.fitted(texts[0])
    assert "even" in alone  # needs no mask
    made, whole = (base.predict(x_t[:1], t[:1], text) for text in (alone, texts[0]))
    assert torch.allclose(made, whole, atol=1e-5)


def test_ids_of_a_data_worker_are_used(base):
    prompts = [SHORT, LONG]
    (ids,) = base.tokenize(prompts)
    assert ids.shape == (2, TEMPLATE_TOKENS + 512)
    known = TokenizedPrompts(prompts, base.tokenizers, (ids,))
    assert torch.equal(base.encode_text(known).tokens, base.encode_text(prompts).tokens)


def test_every_point_sees_the_stream_and_acts_on_it(base):
    x_t, t, text = torch.randn(2, 4, 8, 6), torch.tensor([500.0, 20.0]), base.encode_text([LONG, SHORT])
    (text,) = base.fitted(text)
    seen = {}
    watch = {name: [Tap(function=lambda h, name=name: seen.update({name: h}))] for name in base.points}
    plain = base.predict(x_t, t, text, taps=watch)
    assert torch.equal(plain, base.predict(x_t, t, text))
    assert torch.allclose(seen["time"], base.embed_time(x_t, t, text), atol=1e-5)
    assert all(seen[name].shape == (2, 12, 32) for name in base.points if name != "time")
    assert torch.equal(seen["block.0"], seen["block.1.in"])
    for name in base.points:
        second = {name: [Tap(function=torch.sin, rows=(1, 2))]}
        changed = base.predict(x_t, t, text, taps=second)
        assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1], atol=1e-5), name


def test_residuals_enter_where_diffusers_adds_them(base):
    """The transformer takes outputs of a ControlNet itself: of 2 for 4 blocks, each after two of them."""
    torch.manual_seed(2)
    x_t, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), base.encode_text([SHORT])
    added = [torch.randn(1, 16, 32), torch.randn(1, 16, 32)]
    sites = Residuals({f"block.{place}": added[place // 2] for place in range(4)})
    made = base.predict(x_t, t, text, sites)
    before = base.transformer.forward
    base.transformer.forward = lambda **given: before(**given, controlnet_block_samples=added)
    try:
        expected = base.predict(x_t, t, text)
    finally:
        del base.transformer.forward
    assert torch.allclose(made, expected, atol=1e-5) and not torch.allclose(made, base.predict(x_t, t, text), atol=0.01)
    with refused("incompatible", "'middle'"):
        base.predict(x_t, t, text, Residuals({"middle": torch.zeros(1)}))


def test_gradients_are_the_same_with_checkpointing_and_after_sampling():
    """Rotary embeddings that sampling keeps can be used in training."""
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_qwen_image()
        ours(base, steps=1)
        torch.manual_seed(1)
        x_t, weight = torch.randn(1, 4, 8, 8), torch.full((32,), 0.1, requires_grad=True)
        if checkpointed:
            base.transformer.train()
            base.checkpoint_activations()
        taps = {name: [Tap(function=weight.mul)] for name in base.points if name != "time"}
        base.predict(x_t, torch.tensor([300.0]), base.encode_text([LONG]), taps=taps).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_a_folder_loads(base, folder):
    loaded = load_base(folder)
    assert isinstance(loaded, QwenImage)
    assert loaded.fingerprint == base.fingerprint and loaded.content == load_base(folder).content
    assert torch.equal(ours(loaded), ours(base))
    made = generate(GenerateRequest(prompt=LONG, base=str(folder), steps=2, seeds=(3,), width=64, height=48))
    assert made.used["sampler"] == "euler" and made.used["guidance"] == 4.0
    assert made.images[0].image.size == (64, 48)


def test_its_own_autoencoder_is_replaced_by_one_of_its_kind(base, folder, tmp_path):
    other = build_tiny_qwen_image(seed=5)
    other.vae.save_pretrained(tmp_path / "vae")
    loaded = load_base(folder, vae=str(tmp_path / "vae"))
    assert torch.equal(loaded.vae.encoder.conv_in.weight, other.vae.encoder.conv_in.weight)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 4}))
    with refused("incompatible", "latents_mean"):
        load_base(folder, vae=str(tmp_path / "vae"))
    tiny.build_tiny_flux().vae.save_pretrained(tmp_path / "flux")
    with refused("wrong-kind", "AutoencoderKL", "AutoencoderKLQwenImage"):
        load_base(folder, vae=str(tmp_path / "flux"))
    with refused("unsupported", "single file", "AutoencoderKLQwenImage"):
        load_base(folder, vae=str(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("setting", ["zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_models_that_edit_or_make_layers_are_refused(setting):
    with refused("unsupported", setting, "Qwen-Image-2512"):
        build_tiny_qwen_image(**{setting: True})


def test_sizes_that_do_not_fit(base):
    base.check_size(96, 16)
    with refused("wrong-size", "width 72", "multiple of 16"):
        base.check_size(72, 64)


def test_what_it_does_not_read_of_a_prompt_is_told(base):
    assert base.prompt_tokens == 512 and not base.cut_from(LONG)
    read = 512 + TEMPLATE_TOKENS - len(base.tokenizer(base.chat("\0").partition("\0")[0]).input_ids)
    assert base.cut_from("a" * read) == "" and base.cut_from("a" * read + "bc") == "bc"


def test_a_single_file_takes_the_other_parts_from_the_folder_beside_it(base, tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file({name: value.contiguous() for name, value in base.transformer.state_dict().items()}, file)
    with refused("missing-file", file, "transformer of qwen-image alone", "text_encoder", "vae", tmp_path / "mine"):
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


def test_a_single_file_without_a_weight_is_refused(base, tmp_path):
    folder = saved_pipeline(base, tmp_path / "mine")
    tensors = {name: value.contiguous() for name, value in base.transformer.state_dict().items()}
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    save_file(tensors, tmp_path / "mine.safetensors")
    with refused("damaged-file", folder.with_suffix(".safetensors")):
        load_base(folder.with_suffix(".safetensors"))


def test_real_sizes_are_counted_without_weights():
    facts = describe_base("qwen-image")
    assert facts["transformer"]["parameters"] == 20_430_401_088
    assert facts["text encoder"]["parameters"] == 8_292_166_656
    assert facts["own size"] == "1024 x 1024" and facts["prediction"] == "flow"


def test_what_it_is_told_on_meta_is_what_it_is_told(base):
    on_meta = meta_text(build_meta_base("tiny", QwenImage, tiny.QWEN_IMAGE_PARTS))
    told = base.encode_text([SHORT])
    assert {name: value.shape for name, value in on_meta.named.items()} == {
        name: value.shape for name, value in told.named.items()
    }
    assert {meta_base(name).architecture for name in QwenImage.known} == {"qwen-image"}


def test_half_precision(folder):
    base = load_base(folder, dtype=torch.bfloat16)
    assert base.encode_text([SHORT]).tokens.dtype == torch.bfloat16
    assert ours(base).isfinite().all()


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("__index_timestep_zero__", "edits images"),
        ("time_text_embed.addition_t_embedding.weight", "makes layers"),
        ("control_blocks.0.before_proj.weight", "Fun control"),
    ],
)
def test_files_of_other_models_are_refused(base, mark, said, tmp_path):
    saved_pipeline(base, tmp_path / "mine")
    tensors = {name: value.contiguous() for name, value in base.transformer.state_dict().items()}
    save_file({**tensors, mark: torch.zeros(1)}, tmp_path / "mine.safetensors")
    with refused("unsupported", tmp_path / "mine.safetensors", said, mark):
        load_base(tmp_path / "mine.safetensors")


@pytest.mark.parametrize("pipeline", ["QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
def test_folders_of_other_models_are_refused(folder, pipeline):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    with refused("unsupported", folder, pipeline, "Qwen-Image-2512"):
        load_base(folder)


def test_a_file_under_the_names_of_a_whole_model_is_refused(base, tmp_path):
    tensors = {
        f"model.diffusion_model.{name}": value.contiguous() for name, value in base.transformer.state_dict().items()
    }
    save_file(tensors, tmp_path / "mine.safetensors")
    with refused("unsupported", tmp_path / "mine.safetensors", "whole model", "transformer alone"):
        load_base(tmp_path / "mine.safetensors")


@pytest.mark.parametrize("change", [{"latents_mean": None}, {"latents_mean": [0.0, 1.0]}, {"latents_std": [1.0] * 3}])
def test_an_autoencoder_whose_normalisation_does_not_fit_is_refused(folder, change):
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for read in (load_base, describe_base):
        with refused("damaged-file", folder, next(iter(change)), "4 channels"):
            read(str(folder))


def test_the_time_embedding_is_that_of_the_network_under_autocast(base):
    """Which controls within the base's pass read in training."""
    x_t, t, text = torch.randn(1, 4, 8, 8), torch.tensor([737.3]), base.encode_text([SHORT])
    seen = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base.predict(x_t, t, text, taps={"time": [Tap(function=seen.append)]})
        assert torch.equal(seen[0], base.embed_time(x_t, t, text))
