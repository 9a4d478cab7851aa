"""ControlNet of Qwen-Image: parity with diffusers' pipelines, files, masks, training, errors."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageMultiControlNetModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.apps.cli import main
from controlkit.bases.meta import meta_base
from controlkit.controls.controlnet_qwen_image import ControlNetQwenImage
from controlkit.controls.transformer_control import spread, used_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.images import to_images
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from refusals import refused
from tiny import build_tiny_qwen_image, parts_of, saved_pipeline

PROMPTS = ("cat", "red apple on a blue table")
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_qwen_image()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "qwen-image")


def trained(control, seed=1):
    """The control with zero-initialised layers as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return control.eval().requires_grad_(False)


def inpainting(base):
    """A control that reads four more channels of a token, those of a mask."""
    config = {**ControlNetQwenImage.for_base(base, num_layers=2).config(), "extra_condition_channels": 4}
    return trained(ControlNetQwenImage.class_of(config).from_config(config))


@pytest.fixture
def theirs(base, monkeypatch):
    """Images of diffusers' pipeline, with the mode of the condition's latent in place of a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def make(network, image, kind=QwenImageControlNetPipeline, **settings):
        pipeline = kind(**parts_of(base), controlnet=network)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"true_cfg_scale": 4.0, "negative_prompt": ["dog"] * 2, "width": 64, "height": 64, **settings}
        return pipeline(
            list(PROMPTS),
            control_image=image,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            num_inference_steps=4,
            output_type="pt",
            **settings,
        ).images

    return make


def ours(base, *uses, **changes):
    settings = {"seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "dog", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=PROMPTS, uses=uses, **{**settings, **changes})))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_images_are_those_of_diffusers(base, image, theirs, layers):
    control = trained(ControlNetQwenImage.for_base(base, num_layers=layers))
    span = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    expected = theirs(control.network, image.repeat(2, 1, 1, 1) * 2 - 1, controlnet_conditioning_scale=0.7, **span)
    use = ActiveControl(control, control.encode(image, base), weight=0.7, start=0.25, end=0.75)
    assert (ours(base, use) - expected).abs().max() < 1e-4
    assert (ours(base) - expected).abs().max() > 0.01


def test_a_negative_prompt_has_no_residuals_of_its_own(base, image):
    """As in diffusers' pipeline: the other way, the control would run for both branches."""
    control = trained(ControlNetQwenImage.for_base(base))
    rows = []
    control.network.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    ours(base, ActiveControl(control, control.encode(image, base)))
    assert rows == [2, 2, 2, 2]


def test_without_guidance(base, image, theirs):
    control = trained(ControlNetQwenImage.for_base(base))
    expected = theirs(control.network, image.repeat(2, 1, 1, 1) * 2 - 1, true_cfg_scale=1.0)
    use = ActiveControl(control, control.encode(image, base))
    assert (ours(base, use, guidance=1.0) - expected).abs().max() < 1e-4


def test_two_images_of_a_union_are_those_of_diffusers(base, image, theirs):
    control, other = trained(ControlNetQwenImage.for_base(base)), 1 - image
    given = [each.repeat(2, 1, 1, 1) * 2 - 1 for each in (image, other)]
    both = QwenImageMultiControlNetModel([control.network])
    expected = theirs(both, given, controlnet_conditioning_scale=[0.7, 0.4])
    uses = [
        ActiveControl(control, control.encode(image, base), weight=0.7),
        ActiveControl(control, control.encode(other, base), weight=0.4),
    ]
    assert (ours(base, *uses) - expected).abs().max() < 1e-4


def test_a_masked_image_is_that_of_diffusers(base, image, theirs):
    control = inpainting(base)
    mask = torch.zeros(1, 3, 64, 64)
    mask[..., 10:50, 20:] = 1
    given = {"control_mask": mask[:, :1].repeat(2, 1, 1, 1), "kind": QwenImageControlNetInpaintPipeline}
    expected = theirs(control.network, image.repeat(2, 1, 1, 1) * 2 - 1, controlnet_conditioning_scale=0.6, **given)
    made = ours(base, ActiveControl(control, control.encode({"image": image, "mask": mask}, base), weight=0.6))
    assert (made - expected).abs().max() < 1e-4
    whole = control.encode({"image": image, "mask": torch.zeros_like(mask)}, base)
    assert (made - ours(base, ActiveControl(control, whole, weight=0.6))).abs().max() > 1e-3


def test_a_masked_image_from_the_command_line(base, folder, tmp_path):
    path = save_control(tmp_path / "inpainting.safetensors", inpainting(base), base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name in ("photo", "mask"):
        (pixels,) = to_images(torch.rand(1, 3, 64, 64, generator=generator))
        pixels.save(tmp_path / f"{name}.png")
    (tmp_path / "inputs.json").write_text(json.dumps({"image": "photo.png", "mask": "mask.png"}))
    words = ["generate", "cat", "--base", str(folder), "--steps", "2", "--width", "64", "--height", "64"]
    words += ["--out", str(tmp_path / "out")]
    assert main([*words, "--control", f"{path}={tmp_path / 'inputs.json'}"]) == 0
    assert main([*words, "--control", f"{path}={tmp_path / 'photo.png'}"]) == 2
    with refused("unsupported", "inpainting", "masks"):
        ControlNetQwenImage.for_training(base, ["canny"], {}, name="mine", seed=0, start=inpainting(base))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_new_one_copies_the_base_and_leaves_it_unchanged(base, image, layers):
    control = ControlNetQwenImage.for_base(base, num_layers=layers).eval()
    own = control.network.state_dict()
    shared = own.keys() & base.transformer.state_dict().keys()
    assert {f"transformer_blocks.{layers - 1}.attn.to_q.weight", "img_in.weight", "txt_norm.weight"} <= shared
    assert all(torch.equal(own[name], base.transformer.state_dict()[name]) for name in shared)
    assert torch.equal(ours(base, ActiveControl(control, control.encode(image, base))), ours(base))


def test_numbers_of_blocks_are_checked_and_bounded_by_the_base(base):
    assert ControlNetQwenImage.for_base(base, num_layers=9).network.config.num_layers == 4
    with refused("out-of-range", "num_layers is 0"):
        ControlNetQwenImage.for_base(base, num_layers=0)


def test_no_block_is_copied_whose_output_is_never_used(base):
    control = ControlNetQwenImage.for_base(base, num_layers=3)
    assert control.network.config.num_layers == 2  # each of two outputs follows two of four blocks
    for blocks in (1, 19, 38, 60):
        for outputs in range(1, 70):
            used = used_of(outputs, blocks)
            assert used <= outputs and len(set(spread("block", range(used), blocks).values())) == used
            assert spread("block", range(used), blocks) == spread("block", range(min(outputs, blocks)), blocks)


def test_masks_and_images_are_shared_by_several(base, image):
    control, mask = inpainting(base), torch.zeros(1, 3, 64, 64)
    mask[..., 20:] = 1
    both = torch.cat([image, 1 - image])
    made = control.encode({"image": both, "mask": mask}, base)
    each = [control.encode({"image": one[None], "mask": mask}, base) for one in both]
    assert torch.allclose(made, torch.cat(each), atol=1e-5)
    with refused("missing-setting", "mask"):
        control.encode({"image": image}, base)


def test_a_new_one_for_qwen_image_has_the_size_of_the_released():
    with torch.device("meta"):
        control = ControlNetQwenImage.for_base(meta_base("qwen-image"))
        released = QwenImageControlNetModel(num_layers=5)  # config.json of InstantX/Qwen-Image-ControlNet-Union
    assert control.parameter_counts() == {"parameters": sum(value.numel() for value in released.parameters())}
    assert control.base_blocks == 60


def test_it_is_weighted_by_layer_and_mask(base, image):
    control = trained(ControlNetQwenImage.for_base(base))
    hint = control.encode(image, base)
    whole, none = torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)

    def masked(mask, **settings):
        return ours(base, ActiveControl.in_mode("control", base, control=control, hint=hint, mask=mask, **settings))

    assert torch.equal(masked(none), ours(base)) and torch.equal(masked(None, layers=[0] * 4), ours(base))
    assert torch.equal(masked(whole), masked(None, layers=[1] * 4))
    left = none.clone()
    left[..., :32] = 1
    assert not torch.allclose(masked(left), masked(whole), atol=1e-3)


# Files


def same(base, first, second, image):
    return torch.equal(*(ours(base, ActiveControl(one, one.encode(image, base))) for one in (first, second)))


def test_it_is_saved_and_loaded(base, image, tmp_path):
    control = trained(ControlNetQwenImage.for_base(base, condition="canny", num_layers=2))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "canny" and loaded.base_blocks == 4 and same(base, control, loaded, image)
    assert describe(path)["blocks"] == "2, for the 4 of the base"


def test_diffusers_folder_is_read_and_written(base, image, tmp_path):
    control = trained(ControlNetQwenImage.for_base(base))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    convert(path, tmp_path / "folder", to="diffusers")
    network = QwenImageControlNetModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in control.file_state().items())
    # The blocks of the tiny base are not those of Qwen-Image, and other tools keep no metadata.
    assert same(base, control, load_control(tmp_path / "folder", base), image)
    network.save_pretrained(tmp_path / "folder")
    with refused("incompatible", "blocks of the base: 60, the base's: 4"):
        load_control(tmp_path / "folder", base)


@pytest.mark.parametrize("extra", [0, 4])
def test_shapes_tell_the_config_of_a_bare_file(tmp_path, extra):
    network = QwenImageControlNetModel(
        num_layers=2,
        in_channels=16,
        out_channels=4,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=24,
        extra_condition_channels=extra,
    )
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    control = load_control(tmp_path / "bare.safetensors")
    assert isinstance(control, ControlNetQwenImage) and control.base_blocks == 60
    assert [entry.name for entry in control.inputs] == (["image", "mask"] if extra else ["image"])
    kept = set(network.config) - {"_use_default_values"}
    made = control.network.config
    assert {name: str(made[name]).strip("()[],") for name in kept} == {
        name: str(network.config[name]).strip("()[],") for name in kept
    }


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", ControlNetQwenImage.for_base(base), base)
    tensors = load_file(path)
    tensors.pop("controlnet_blocks.1.bias")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "controlnet_blocks.1.bias"):
        load_control(path, base)


def test_channels_that_are_no_mask_are_refused(base, tmp_path):
    control = ControlNetQwenImage.for_base(base)
    path = save_control(tmp_path / "mine.safetensors", control, base)
    convert(path, tmp_path / "folder", to="diffusers")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "extra_condition_channels": 3}))
    with refused("damaged-file", "extra_condition_channels is 3"):
        load_control(tmp_path / "folder", base)


def test_it_moves_to_another_model_of_its_family(base, image):
    other = build_tiny_qwen_image(seed=7)
    control = trained(ControlNetQwenImage.for_base(base))
    moved, _ = transfer(control, base, other)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.allclose(moved.network.state_dict()[name], other.transformer.state_dict()[name], atol=1e-6)
    assert moved.incompatibility(other) is None


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of Qwen-Image", "UNet2DConditionModel"):
        ControlNetQwenImage.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", ControlNetQwenImage.for_base(base), base)
    with refused("incompatible", path, "transformer of Qwen-Image"):
        load_control(path, tiny_base)


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_an_image_of_another_size_is_refused(base, size):
    with refused("wrong-size", "60"):
        ControlNetQwenImage.for_base(base).encode(torch.zeros(1, 3, *size), base)


# From the command line


def test_it_is_trained_resumed_and_used(folder, tmp_path):
    check_training(folder, tmp_path, system="controlnet-qwen-image", gradient_checkpointing="true")
