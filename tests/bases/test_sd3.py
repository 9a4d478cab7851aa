"""Stable Diffusion 3 through the same interface: parity with diffusers, folders, single files, sites, points, sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, StableDiffusion3Pipeline
from original_names import original_clip_of_sd3, original_sd3, original_vae
from safetensors.torch import save_file

import tiny
from controlkit.apps.cli import main
from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.load import load_base
from controlkit.bases.meta import build_meta_base, meta_base, meta_text
from controlkit.bases.residuals import Residuals
from controlkit.bases.sd3 import StableDiffusion3
from controlkit.bases.single_file import read_single_file
from controlkit.bases.taps import Tap
from controlkit.formats.describe import describe_base
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from refusals import refused
from tiny import build_tiny_sd3

PROMPT = "red apple on a blue table"
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_sd3()


@pytest.fixture(scope="module")
def without_t5():
    return build_tiny_sd3(t5=False)


def pipeline_of(base):
    parts = {one.name: getattr(base, one.name) for one in base.components if not one.is_scheduler}
    return StableDiffusion3Pipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(**base.scheduler_config))


@pytest.fixture
def folder(base, tmp_path):
    pipeline_of(base).save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def theirs(pipeline, negative="", **changes):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [PROMPT] * len(SEEDS),
        negative_prompt=[negative] * len(SEEDS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="pt",
        **changes,
    ).images


def ours(base, negative="", **changes):
    batches = sample(base, prompt=PROMPT, negative_prompt=negative, seeds=SEEDS, steps=4, guidance=4.0, **changes)
    return torch.cat(list(batches))


@pytest.mark.parametrize(("negative", "width", "height"), [("", 64, 64), ("cat face", 64, 64), ("", 96, 48)])
def test_images_are_those_of_diffusers(base, negative, width, height):
    expected = theirs(pipeline_of(base), negative, width=width, height=height)
    made = ours(base, negative, width=width, height=height)
    assert made.shape == (2, 3, height, width)
    assert (made - expected).abs().max() < 1e-3


def test_without_t5_its_tokens_are_zeros_as_in_diffusers(without_t5):
    expected = theirs(pipeline_of(without_t5), width=64, height=64)
    assert (ours(without_t5) - expected).abs().max() < 1e-3
    text = without_t5.encode_text([PROMPT])
    assert text.tokens.shape == (1, 77 + 256, 32) and not text.tokens[:, 77:].any()


def test_a_folder_loads(base, folder):
    loaded = load_base(folder)
    assert isinstance(loaded, StableDiffusion3)
    assert loaded.fingerprint == base.fingerprint and loaded.content == load_base(folder).content
    assert torch.equal(ours(loaded), ours(base))
    made = generate(GenerateRequest(prompt=PROMPT, base=str(folder), steps=2, seeds=(3,)))
    assert made.used["sampler"] == "euler" and made.used["guidance"] == 7.0
    assert made.images[0].image.size == (64, 64)


def test_t5_may_be_missing_from_a_folder_whose_index_does_not_list_it(folder):
    parts = ("tokenizer_3", "text_encoder_3")
    for part in parts:
        shutil.rmtree(folder / part)
    with refused("missing-file", folder, "model_index.json", "tokenizer_3"):
        load_base(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **{part: [None, None] for part in parts}}))
    assert load_base(folder).text_encoder_3 is None


def test_a_transformer_of_another_family_is_refused(folder):
    config = PixArtTransformer2DModel(num_layers=1, attention_head_dim=16, num_attention_heads=1)
    config.save_config(folder / "transformer")
    with refused("wrong-kind", folder, "PixArtTransformer2DModel", "SD3Transformer2DModel"):
        load_base(folder)


def test_text_encoders_can_stay_where_they_are(base):
    moved = build_tiny_sd3().to(device="meta", text_device="cpu")
    assert {parameter.device.type for encoder in moved.text_encoders for parameter in encoder.parameters()} == {"cpu"}
    assert moved.device.type == moved.vae.device.type == "meta"
    text = moved.encode_text([PROMPT])
    assert text.tokens.device.type == "meta" and text.tokens.shape == base.encode_text([PROMPT]).tokens.shape


def test_a_request_says_where_text_encoders_stay(folder):
    words = ["generate", PROMPT, "--base", str(folder), "--steps", "1", "--text-device", "cpu", "--device", "cpu"]
    assert main([*words, "--out", str(folder.parent / "out")]) == 0
    with refused("device-unavailable", "gpu9"):
        generate(GenerateRequest(prompt=PROMPT, base=str(folder), steps=1, text_device="gpu9"))


def test_residuals_are_those_of_diffusers(base):
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([500.0, 20.0])
    text = base.encode_text([PROMPT, "cat"])
    added = [torch.randn(2, 64, 16, generator=generator) for _ in range(3)]
    expected = base.transformer(
        x_t,
        timestep=t,
        encoder_hidden_states=text.tokens,
        pooled_projections=text["pooled"],
        block_controlnet_hidden_states=added,
        return_dict=False,
    )[0]
    assert list(base.sites) == ["block.0", "block.1"]
    made = base.predict(x_t, t, text, Residuals.numbered("block", added[:2]))
    assert torch.allclose(made, expected, atol=1e-5)
    assert not torch.allclose(made, base.predict(x_t, t, text), atol=1e-2)
    with refused("incompatible", "'block.2'"):
        base.predict(x_t, t, text, Residuals({"block.2": added[2]}))


def test_every_point_sees_the_stream_and_acts_on_it(base):
    x_t, t, text = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 20.0]), base.encode_text([PROMPT, "cat"])
    seen = {}
    watch = {name: [Tap(function=lambda h, name=name: seen.update({name: h}))] for name in base.points}
    plain = base.predict(x_t, t, text, taps=watch)
    assert torch.equal(plain, base.predict(x_t, t, text))
    assert torch.allclose(seen["time"], base.embed_time(x_t, t, text))
    assert all(seen[f"block.{n}"].shape == (2, 64, 16) for n in range(3))
    assert torch.equal(seen["block.0"], seen["block.1.in"]) and torch.equal(seen["block.1"], seen["block.2.in"])
    for name in base.points:
        second = {name: [Tap(function=torch.sin, rows=(1, 2))]}
        changed = base.predict(x_t, t, text, taps=second)
        assert torch.equal(changed[0], plain[0]) and not torch.allclose(changed[1], plain[1], atol=1e-4), name


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_sd3()
        torch.manual_seed(1)
        x_t, weight = torch.randn(1, 4, 16, 16), torch.full((16,), 0.1, requires_grad=True)
        if checkpointed:
            base.transformer.train()
            base.checkpoint_activations()
        taps = {f"block.{n}": [Tap(function=weight.mul)] for n in range(3)}
        base.predict(x_t, torch.tensor([300.0]), base.encode_text([PROMPT]), taps=taps).square().mean().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("width", "fact"), [(68, "multiple of 8"), (104, "96 pixels")])
def test_sizes_that_do_not_fit(base, width, fact):
    base.check_size(96, 8)
    with refused("wrong-size", f"width {width}", fact):
        base.check_size(width, 64)


T5 = {"tokenizer_3": "TokenizerFast", "text_encoder_3": "EncoderModel"}


def real_width(layers):
    """A transformer by whose widths diffusers knows Stable Diffusion 3, with a few blocks and narrow text."""
    return {
        **KNOWN_BASES["sd3-medium"][1]["transformer"],
        "num_layers": layers,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 28,
        "sample_size": 16,
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_a_single_file_loads_with_a_local_configuration(layers, tmp_path):
    parts = {**tiny.SD3_PARTS, "transformer": real_width(layers)}
    torch.manual_seed(2)
    networks = {
        one.name: one.build(parts[one.name]).eval()
        for one in StableDiffusion3.components
        if one.is_network and not one.optional
    }
    # The original layout has no projection of the first encoder, which diffusers takes for the identity.
    torch.nn.init.eye_(networks["text_encoder"].text_projection.weight)
    file = tmp_path / "model.safetensors"
    tensors = original_sd3(networks["transformer"]) | original_vae(networks["vae"])
    tensors |= original_clip_of_sd3(networks["text_encoder"], networks["text_encoder_2"])
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    made = build_tiny_sd3(t5=False)
    local = StableDiffusion3(
        name="local",
        scheduler_config=parts["scheduler"],
        **networks,
        **{name: getattr(made, name) for name in ("tokenizer", "tokenizer_2")},
    )
    pipeline_of(local).save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    found = read_single_file(file)
    assert found.companion == tmp_path / "model" and found.left_out == ("tokenizer_3", "text_encoder_3")
    assert not found.beside
    base = load_base(file)
    assert base.fingerprint == local.fingerprint
    x_t, t = torch.randn(1, 4, 16, 16), torch.tensor([400.0])
    expected = local.predict(x_t, t, local.encode_text([PROMPT]))
    assert torch.allclose(base.predict(x_t, t, base.encode_text([PROMPT])), expected, atol=1e-5)
    if layers == 1:  # T5 of another folder, beside the file
        whole = build_tiny_sd3()
        index = json.loads((tmp_path / "model" / "model_index.json").read_text())
        index |= {name: ["transformers", f"T5{kind}"] for name, kind in T5.items()}
        (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
        whole.tokenizer_3.save_pretrained(tmp_path / "model" / "tokenizer_3")
        whole.text_encoder_3.save_pretrained(tmp_path / "model" / "text_encoder_3")
        assert read_single_file(file).beside == ("text_encoder_3",) and not read_single_file(file).left_out
        for dtype in (torch.float32, torch.float16):
            t5, own = (load_base(file, dtype=dtype).text_encoder_3.state_dict(), whole.text_encoder_3.state_dict())
            assert all(torch.allclose(t5[name].float(), value, atol=1e-3) for name, value in own.items())


def test_in_float16_the_layers_of_t5_that_overflow_stay_float32(folder):
    """As transformers loads them (`_keep_in_fp32_modules`)."""

    def dtypes_of(base):
        return {name: value.dtype for name, value in base.text_encoder_3.named_parameters()}

    base = load_base(folder)
    wo = next(name for name in dtypes_of(base) if name.endswith("DenseReluDense.wo.weight"))
    before = base.text_encoder_3.get_parameter(wo).clone()
    dtypes = dtypes_of(load_base(folder, dtype=torch.float16))
    base.to(dtype=torch.float16)
    assert dtypes_of(base) == dtypes
    assert dtypes[wo] == torch.float32 and torch.equal(base.text_encoder_3.get_parameter(wo), before)
    assert base.to(dtype=torch.bfloat16).text_encoder_3.get_parameter(wo).dtype == torch.bfloat16


def test_a_single_file_is_described_by_what_is_in_it(tmp_path):
    """Blocks, positions and dual attention are read from the file; real text encoders are counted without weights."""
    config = {**KNOWN_BASES["sd35-medium"][1]["transformer"], "num_layers": 2, "dual_attention_layers": [0]}
    with torch.device("meta"):
        transformer = StableDiffusion3.denoiser_component().build(config)
    names = original_sd3(transformer)
    shapes = {name: tuple(value.shape) for name, value in names.items()}
    shapes |= {"first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3)}
    shapes |= {f"text_encoders.{which}.transformer.x": (1,) for which in ("clip_l", "clip_g")}
    kind = StableDiffusion3.recognise(shapes, "file")
    known, notes = StableDiffusion3.configurations_of_file(KNOWN_BASES[kind][1], shapes, {})
    assert kind == "sd35-medium" and not notes
    assert known["transformer"]["num_layers"] == 2 and known["transformer"]["dual_attention_layers"] == [0]
    assert known["transformer"]["pos_embed_max_size"] == 384 and "text_encoder_3" not in known
    counted = build_meta_base("file", StableDiffusion3, known)
    made, expected = counted.transformer.state_dict(), transformer.state_dict()
    assert {name: value.shape for name, value in made.items()} == {name: v.shape for name, v in expected.items()}


@pytest.mark.parametrize(
    ("name", "transformer", "autoencoder", "text"),
    [
        ("sd3-medium", 2_028_328_000, 83_819_683, 4_762_310_656),
        ("sd35-medium", 2_243_171_520, 83_819_683, 4_762_310_656),
        ("sd35-large", 8_056_627_520, 83_819_683, 4_762_310_656),
    ],
)
def test_real_sizes_are_counted_without_weights(name, transformer, autoencoder, text):
    facts = describe_base(name)
    assert facts["transformer"]["parameters"] == transformer
    assert facts["autoencoder"]["parameters"] == autoencoder
    assert facts["text encoder 3"]["parameters"] == text
    assert facts["own size"] == "1024 x 1024" and facts["prediction"] == "flow"
    assert facts["GFLOP at 1024 x 1024"]["transformer call"] > 1000


def test_what_it_is_told_on_meta_is_what_it_is_told(base):
    on_meta = meta_text(build_meta_base("tiny", StableDiffusion3, tiny.SD3_PARTS))
    told = base.encode_text([PROMPT])
    assert {name: value.shape for name, value in on_meta.named.items()} == {
        name: value.shape for name, value in told.named.items()
    }
    assert meta_base("sd3-medium").architecture == "stable-diffusion-v3"
