"""ControlNet of FLUX.1: parity with diffusers' pipeline, files of every maker, masks, training, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxMultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.apps.cli import main
from controlkit.controls.controlnet_flux import ControlNetFlux
from controlkit.controls.encoder_copy.network import plain_config
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse
from refusals import refused
from tiny import build_tiny_flux, parts_of, saved_pipeline

SEEDS = (3, 11)
SETTINGS = {"prompt": "red apple", "seeds": SEEDS, "steps": 4, "guidance": 4.0}


@pytest.fixture(scope="module")
def base():
    return build_tiny_flux()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "flux")


def trained(control, seed=1):
    """The control with zero-initialised layers as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return control.eval().requires_grad_(False)


def network_of_xlabs(base):
    """A network that reads the image through convolutions, with outputs for double blocks alone, as XLabs'."""
    torch.manual_seed(5)
    config = plain_config(base.transformer)
    del config["out_channels"]
    config |= {"num_layers": 2, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 4}
    network = FluxControlNetModel.from_config(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


@pytest.fixture
def theirs(base, monkeypatch):
    """Images of diffusers' pipeline, with the mode of the condition's latent in place of a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def make(network, image, base=base, **settings):
        pipeline = FluxControlNetPipeline(**parts_of(base), controlnet=network)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            [SETTINGS["prompt"]] * len(SEEDS),
            control_image=image,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            num_inference_steps=SETTINGS["steps"],
            output_type="pt",
            **{"guidance_scale": SETTINGS["guidance"], **settings},
        ).images

    return make


def ours(base, *uses, **changes):
    return torch.cat(list(sample(base, uses=list(uses), **{**SETTINGS, **changes})))


@pytest.mark.parametrize("single", [0, 2, 4])
def test_images_are_those_of_diffusers(base, image, theirs, single):
    control = trained(ControlNetFlux.for_base(base, num_layers=2, num_single_layers=single))
    span = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    expected = theirs(control.network, image * 2 - 1, controlnet_conditioning_scale=0.7, **span)
    use = ActiveControl(control, control.encode({"image": image}, base), weight=0.7, start=0.25, end=0.75)
    assert (ours(base, use) - expected).abs().max() < 1e-3
    assert (ours(base) - expected).abs().max() > 0.01


def test_two_of_them_are_those_of_diffusers(base, image, theirs):
    first, second = (trained(ControlNetFlux.for_base(base), seed) for seed in (1, 2))
    other = 1 - image
    both = FluxMultiControlNetModel([first.network, second.network])
    expected = theirs(both, [image * 2 - 1, other * 2 - 1], controlnet_conditioning_scale=[0.7, 0.4])
    uses = [
        ActiveControl(first, first.encode({"image": image}, base), weight=0.7),
        ActiveControl(second, second.encode({"image": other}, base), weight=0.4),
    ]
    assert (ours(base, *uses) - expected).abs().max() < 1e-3


def test_one_of_dev_on_schnell_is_told_the_usual_guidance(image, theirs, base):
    schnell = build_tiny_flux(guidance_embeds=False)
    control = trained(ControlNetFlux.for_base(base))
    expected = theirs(control.network, image * 2 - 1, base=schnell, guidance_scale=3.5)
    use = ActiveControl(control, control.encode({"image": image}, schnell))
    assert (ours(schnell, use, guidance=None) - expected).abs().max() < 1e-3


def test_under_guidance_of_schnell_it_acts_on_both_branches(image, theirs, base):
    schnell = build_tiny_flux(guidance_embeds=False)
    control = trained(ControlNetFlux.for_base(base))
    guided = {"true_cfg_scale": 2.5, "negative_prompt": ["blue table"] * len(SEEDS)}
    expected = theirs(control.network, image * 2 - 1, base=schnell, guidance_scale=3.5, **guided)
    use = ActiveControl(control, control.encode({"image": image}, schnell))
    assert (ours(schnell, use, guidance=2.5, negative_prompt="blue table") - expected).abs().max() < 1e-3


@pytest.mark.parametrize("layers", [1, 2])
def test_a_new_one_copies_the_base_and_leaves_it_unchanged(base, image, layers):
    control = ControlNetFlux.for_base(base, num_layers=layers, num_single_layers=layers).eval()
    own = control.network.state_dict()
    shared = own.keys() & base.transformer.state_dict().keys()
    assert f"single_transformer_blocks.{layers - 1}.attn.to_q.weight" in shared and "x_embedder.weight" in shared
    assert all(torch.equal(own[name], base.transformer.state_dict()[name]) for name in shared)
    assert torch.equal(ours(base, ActiveControl(control, control.encode({"image": image}, base))), ours(base))


def test_numbers_of_blocks_are_checked_and_bounded_by_the_base(base):
    config = ControlNetFlux.for_base(base, num_layers=9, num_single_layers=9).network.config
    assert (config.num_layers, config.num_single_layers) == (3, 4)
    with refused("out-of-range", "num_layers is 0"):
        ControlNetFlux.for_base(base, num_layers=0)
    with refused("out-of-range", "num_single_layers is -1"):
        ControlNetFlux.for_base(base, num_single_layers=-1)


def test_it_is_weighted_by_layer_and_mask_but_not_by_resolution(base, image):
    control = trained(ControlNetFlux.for_base(base))
    hint = control.encode({"image": image}, base)
    whole, none = torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)

    def masked(mask, **settings):
        return ours(base, ActiveControl.in_mode("control", base, control=control, hint=hint, mask=mask, **settings))

    assert torch.equal(masked(none), ours(base)) and torch.equal(masked(None, layers=[0] * 7), ours(base))
    assert torch.equal(masked(whole), masked(None, layers=[1] * 7))
    left = none.clone()
    left[..., :32] = 1
    assert not torch.allclose(masked(left), masked(whole), atol=1e-3)
    with refused("incompatible", "soft", "have one"):
        ActiveControl.in_mode("soft", base, control=control, hint=hint)


def union_of(base, condition=None):
    """A union of ten modes, as InstantX's, whose outputs depend on the mode."""
    torch.manual_seed(5)
    made = ControlNetFlux.from_config({**ControlNetFlux.for_base(base).config(), "num_mode": 10}, condition)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(made.network.controlnet_mode_embedder.weight, std=30)  # one token beside 512
    return made.eval().requires_grad_(False)


# Unions


@pytest.mark.parametrize(
    ("task", "mode"), [("canny", 0), ("tile", 1), ("depth", 2), ("pose", 4), ("gray", 5), ("LQ", 6)]
)
def test_a_task_of_a_union_is_a_mode_of_diffusers(base, image, theirs, task, mode):
    control = union_of(base)
    expected = theirs(control.network, image * 2 - 1, control_mode=mode, controlnet_conditioning_scale=0.5)
    hints = [control.encode({"image": image, "task": each}, base) for each in (task, "blur")]
    same, other = ((ours(base, ActiveControl(control, hint, weight=0.5)) - expected).abs().max() for hint in hints)
    assert same < 1e-4 and same < other / 5  # of 513 tokens one tells the task


def test_a_union_needs_a_task_and_others_take_none(base, image):
    control = union_of(base)
    with refused("missing-setting", "canny, downscale, depth", "task=canny"):
        control.encode({"image": image}, base)
    with refused("unknown-name", "'cany'", "canny"):
        control.encode({"image": image, "task": "cany"}, base)
    with refused("contradiction", "no union", "task=canny"):
        ControlNetFlux.for_base(base).encode({"image": image, "task": "canny"}, base)
    assert union_of(base, "depth").encode({"image": image}, base)["mode"].tolist() == [[2]]
    assert {"canny", "openpose", "grayscale"} < set(control.conditions) and not ControlNetFlux.for_base(base).conditions
    with refused("unsupported", "union"):
        ControlNetFlux.for_training(base, ["canny"], {}, name="mine", seed=0, start=control)


def test_a_union_of_fewer_modes_has_fewer_tasks(base, image, tmp_path):
    network = ControlNetFlux.from_config({**ControlNetFlux.for_base(base).config(), "num_mode": 2}).network
    network.save_pretrained(tmp_path / "union")
    assert describe(tmp_path / "union")["tasks"] == "canny, downscale"
    with refused("unknown-name", "depth"):
        convert(tmp_path / "union", tmp_path / "u.safetensors", to="controlkit", condition="depth")
    with refused("unknown-name", "'depth'"):
        union = ControlNetFlux(network, base_blocks=(3, 4))
        union.encode({"image": image, "task": "depth"}, base)


def test_a_folder_of_a_union_from_the_command_line(base, folder, tmp_path):
    save_control(tmp_path / "union.safetensors", union_of(base), base, dtype=torch.float32)
    convert(tmp_path / "union.safetensors", tmp_path / "union", to="diffusers")
    source = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(source)
    made = []
    for task in ("canny", "grayscale"):
        use = ControlUse(control=str(tmp_path / "union"), inputs={"image": str(source), "task": task})
        result = generate(GenerateRequest(prompt="red apple", base=str(folder), controls=(use,), steps=2))
        made.append(result.images[0].image.tobytes())
    assert made[0] != made[1]
    words = ["generate", "red apple", "--base", str(folder), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*words, "--control", f"{tmp_path / 'union'}={source},task=canny"]) == 0
    assert main([*words, "--control", f"{tmp_path / 'union'}={source}"]) == 2
    (said,) = [describe(tmp_path / "union")["tasks"]]
    assert said == "canny, downscale, depth, blur, openpose, grayscale, lq"


# Files


def same(base, first, second, image):
    return torch.equal(*(ours(base, ActiveControl(one, one.encode({"image": image}, base))) for one in (first, second)))


def test_it_is_saved_and_loaded(base, image, tmp_path):
    control = trained(ControlNetFlux.for_base(base, condition="canny", num_layers=2))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "canny" and loaded.base_blocks == (3, 4) and same(base, control, loaded, image)
    assert describe(path)["blocks"] == "2 double and 4 single, for the 3 and 4 of the base"


def test_diffusers_folder_is_read_and_written(base, image, tmp_path):
    control = trained(ControlNetFlux.for_base(base))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    convert(path, tmp_path / "folder", to="diffusers")
    network = FluxControlNetModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in control.file_state().items())
    # The blocks of the tiny base are not those of FLUX.1, and other tools keep no metadata.
    assert same(base, control, load_control(tmp_path / "folder", base), image)
    network.save_pretrained(tmp_path / "folder")
    with refused("incompatible", "blocks of the base: [19, 38], the base's: [3, 4]"):
        load_control(tmp_path / "folder", base)


def test_those_of_xlabs(base, image, theirs, tmp_path):
    network = network_of_xlabs(base)
    network.save_pretrained(tmp_path / "cn")
    config = json.loads((tmp_path / "cn" / "config.json").read_text())
    (tmp_path / "cn" / "config.json").write_text(json.dumps({**config, "base_blocks": [3, 4]}))
    control = load_control(tmp_path / "cn", base)
    hint = control.encode({"image": image}, base)
    assert torch.equal(hint, image * 2 - 1)
    made = ours(base, ActiveControl(control, hint, weight=0.6))
    assert (made - theirs(network, image * 2 - 1, controlnet_conditioning_scale=0.6)).abs().max() < 1e-3
    assert (made - ours(base)).abs().max() > 0.01


@pytest.mark.parametrize("of_xlabs", [False, True])
def test_shapes_tell_the_config_of_a_bare_file(tmp_path, of_xlabs):
    network = FluxControlNetModel(
        num_layers=2,
        num_single_layers=0 if of_xlabs else 1,
        in_channels=16,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=not of_xlabs,
        patch_size=2 if of_xlabs else 1,
        conditioning_embedding_channels=4 if of_xlabs else None,
    )
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    control = load_control(tmp_path / "bare.safetensors")
    assert isinstance(control, ControlNetFlux) and control.base_blocks == (19, 38)
    kept = set(network.config) - {"_use_default_values"}
    made = control.network.config
    assert {name: str(made[name]).strip("()[],") for name in kept} == {
        name: str(network.config[name]).strip("()[],") for name in kept
    }


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", ControlNetFlux.for_base(base), base)
    tensors = load_file(path)
    tensors.pop("controlnet_single_blocks.1.bias")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "controlnet_single_blocks.1.bias"):
        load_control(path, base)


def test_it_moves_to_another_model_of_its_family(base, image):
    other = build_tiny_flux(seed=7)
    control = trained(ControlNetFlux.for_base(base))
    moved, _ = transfer(control, base, other)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.allclose(moved.network.state_dict()[name], other.transformer.state_dict()[name], atol=1e-6)
    assert moved.incompatibility(other) is None and not torch.equal(moved.encode({"image": image}, other), image)


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of FLUX.1", "UNet2DConditionModel"):
        ControlNetFlux.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", ControlNetFlux.for_base(base), base)
    with refused("incompatible", path, "transformer of FLUX.1"):
        load_control(path, tiny_base)


def test_a_file_under_the_names_of_xlabs_is_not_taken_for_a_base(tmp_path):
    names = ("double_blocks.0.img_attn.qkv.weight", "controlnet_blocks.0.weight", "input_hint_block.0.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "xlabs.safetensors")
    with refused("wrong-kind", "XLabs", "diffusers"):
        load_control(tmp_path / "xlabs.safetensors")


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_an_image_of_another_size_is_refused(base, size):
    with refused("wrong-size", "60"):
        ControlNetFlux.for_base(base).encode({"image": torch.zeros(1, 3, *size)}, base)


# From the command line


def test_it_is_trained_resumed_and_used(folder, tmp_path):
    check_training(folder, tmp_path, system="controlnet-flux", gradient_checkpointing="true")
