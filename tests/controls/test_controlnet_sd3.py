"""ControlNet of Stable Diffusion 3: parity with diffusers' pipeline, files of every maker, masks, training, errors."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.controls.controlnet_sd3 import ControlNetSD3
from controlkit.controls.controlnet_sd3.network import STABILITY_CANNY_PIXELS, STABILITY_DEPTH_PIXELS, USUAL_PIXELS
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from refusals import refused
from tiny import SD3_PARTS, build_tiny_sd3, saved_pipeline

SEEDS = (3, 11)
SETTINGS = {"prompt": "red apple", "negative_prompt": "cat", "seeds": SEEDS, "steps": 4, "guidance": 4.0}


@pytest.fixture(scope="module")
def base():
    return build_tiny_sd3()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(control, seed=1):
    """The control with zero-initialised layers as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in control.named_parameters():
        if "controlnet_blocks" in name or "pos_embed_input" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return control.eval().requires_grad_(False)


def network_of_stability(base):
    """A network over the image alone, without a position embedding, as Stability AI's."""
    torch.manual_seed(5)
    config = base.transformer.config
    network = SD3ControlNetModel(
        num_layers=2,
        in_channels=config.in_channels,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        pooled_projection_dim=config.pooled_projection_dim,
        joint_attention_dim=None,
        caption_projection_dim=2048,
        pos_embed_max_size=None,
        pos_embed_type=None,
        use_pos_embed=False,
        force_zeros_for_pooled_projection=False,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def parts_of(base):
    """Arguments of diffusers' pipelines."""
    parts = {one.name: getattr(base, one.name) for one in base.components if not one.is_scheduler}
    return {**parts, "scheduler": FlowMatchEulerDiscreteScheduler(**base.scheduler_config)}


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "sd3")


@pytest.fixture
def theirs(base, monkeypatch):
    """Images of diffusers' pipeline, with the mode of the condition's latent in place of a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def make(network, image, **settings):
        pipeline = StableDiffusion3ControlNetPipeline(**parts_of(base), controlnet=network)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            [SETTINGS["prompt"]] * len(SEEDS),
            negative_prompt=[SETTINGS["negative_prompt"]] * len(SEEDS),
            control_image=image,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            num_inference_steps=SETTINGS["steps"],
            guidance_scale=SETTINGS["guidance"],
            output_type="pt",
            **settings,
        ).images

    return make


def ours(base, *uses):
    return torch.cat(list(sample(base, uses=list(uses), **SETTINGS)))


@pytest.mark.parametrize("reads_pooled", [False, True])
def test_images_are_those_of_diffusers(base, image, theirs, reads_pooled):
    control = trained(ControlNetSD3.for_base(base, reads_pooled=reads_pooled))
    span = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    expected = theirs(control.network, image * 2 - 1, controlnet_conditioning_scale=0.7, **span)
    use = ActiveControl(control, control.encode(image, base), weight=0.7, start=0.25, end=0.75)
    assert (ours(base, use) - expected).abs().max() < 1e-3
    assert (ours(base) - expected).abs().max() > 0.05


def test_two_of_them_are_those_of_diffusers(base, image, theirs):
    first, second = (trained(ControlNetSD3.for_base(base), seed) for seed in (1, 2))
    other = 1 - image
    both = SD3MultiControlNetModel([first.network, second.network])
    expected = theirs(both, [image * 2 - 1, other * 2 - 1], controlnet_conditioning_scale=[0.7, 0.4])
    uses = [
        ActiveControl(first, first.encode(image, base), weight=0.7),
        ActiveControl(second, second.encode(other, base), weight=0.4),
    ]
    assert (ours(base, *uses) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("layers", [1, 2])
def test_a_new_one_copies_the_base_and_leaves_it_unchanged(base, image, layers):
    control = ControlNetSD3.for_base(base, num_layers=layers).eval()
    shared = control.network.state_dict().keys() & base.transformer.state_dict().keys()
    assert f"transformer_blocks.{layers - 1}.attn.to_q.weight" in shared and "pos_embed.pos_embed" in shared
    assert all(torch.equal(control.network.state_dict()[name], base.transformer.state_dict()[name]) for name in shared)
    assert torch.equal(ours(base, ActiveControl(control, control.encode(image, base))), ours(base))


def test_as_many_blocks_as_the_base_has_are_not_copied(base):
    assert ControlNetSD3.for_base(base).network.config.num_layers == 2
    with refused("out-of-range", "num_layers is 0"):
        ControlNetSD3.for_base(base, num_layers=0)


def test_it_is_weighted_by_layer_and_mask_but_not_by_resolution(base, image):
    control = trained(ControlNetSD3.for_base(base))
    hint = control.encode(image, base)
    whole, none = torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)

    def masked(mask, **settings):
        return ours(base, ActiveControl.in_mode("control", base, control=control, hint=hint, mask=mask, **settings))

    assert torch.equal(masked(none), ours(base)) and torch.equal(masked(None, layers=[0, 0]), ours(base))
    assert torch.equal(masked(whole), masked(None, layers=[1, 1]))
    left = none.clone()
    left[..., :32] = 1
    assert not torch.allclose(masked(left), masked(whole), atol=1e-3)
    with refused("incompatible", "soft", "have one"):
        ActiveControl.in_mode("soft", base, control=control, hint=hint)


# Files


def same(base, first, second, image):
    return torch.equal(*(ours(base, ActiveControl(one, one.encode(image, base))) for one in (first, second)))


def test_it_is_saved_and_loaded(base, image, tmp_path):
    control = trained(ControlNetSD3.for_base(base, condition="canny"))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "canny" and loaded.base_layers == 3 and same(base, control, loaded, image)
    assert describe(path)["blocks"] == "2, for the 3 of the base"


def test_diffusers_folder_is_read_and_written(base, image, tmp_path):
    control = trained(ControlNetSD3.for_base(base))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    convert(path, tmp_path / "folder", to="diffusers")
    network = SD3ControlNetModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in control.file_state().items())
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["force_zeros_for_pooled_projection"] is True and "base_layers" not in config
    # The tiny base has three blocks and two heads; in every real one the numbers agree. Other tools keep no metadata.
    assert same(base, control, load_control(tmp_path / "folder", base), image)
    network.save_pretrained(tmp_path / "folder")
    with refused("incompatible", "blocks of the base: 2, the base's: 3"):
        load_control(tmp_path / "folder", base)
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "base_layers": 3}))
    assert same(base, control, load_control(tmp_path / "folder", base), image)


def test_shapes_tell_the_config_of_a_bare_file(tmp_path):
    network = SD3ControlNetModel(
        num_layers=2,
        in_channels=4,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=128,
        pooled_projection_dim=20,
        pos_embed_max_size=6,
        sample_size=8,
        dual_attention_layers=(1,),
        qk_norm="rms_norm",
    )
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    control = load_control(tmp_path / "bare.safetensors")
    assert isinstance(control, ControlNetSD3)
    kept = set(network.config) - {"sample_size", "out_channels", "_use_default_values"}
    made = control.network.config
    assert {name: str(made[name]).strip("()[],") for name in kept} == {
        name: str(network.config[name]).strip("()[],") for name in kept
    }


def test_a_folder_of_stability_takes_the_position_embedding_of_its_base(base, image, theirs, folder, tmp_path):
    network = network_of_stability(base)
    network.save_pretrained(tmp_path / "cn")
    config = json.loads((tmp_path / "cn" / "config.json").read_text())
    (tmp_path / "cn" / "config.json").write_text(json.dumps({**config, "base_layers": 3}))
    with refused("missing-setting", tmp_path / "cn", "position embedding", "--base"):
        load_control(tmp_path / "cn")
    control = load_control(tmp_path / "cn", base)
    expected = theirs(network, image * 2 - 1)
    made = ours(base, ActiveControl(control, control.encode(image, base)))
    assert (made - expected).abs().max() < 1e-3 and (made - ours(base)).abs().max() > 0.05
    convert(tmp_path / "cn", tmp_path / "one.safetensors", to="controlkit", base=str(folder))
    assert same(base, control, load_control(tmp_path / "one.safetensors", base), image)


def stability_names(network):
    """Its tensors under the names of Stability AI's files."""
    renamed = {}
    for name, value in network.state_dict().items():
        block, _, rest = name.partition(".attn.to_q.")
        if rest:
            parts = [network.state_dict()[f"{block}.attn.to_{which}.{rest}"] for which in "qkv"]
            renamed[f"{block}.attn.qkv.{rest}"] = torch.cat(parts)
        elif ".attn.to_k." not in name and ".attn.to_v." not in name:
            for theirs_, own in (
                ("attn.proj", "attn.to_out.0"),
                ("mlp.fc1", "ff.net.0.proj"),
                ("mlp.fc2", "ff.net.2"),
                ("adaLN_modulation.1", "norm1.linear"),
            ):
                name = name.replace(own, theirs_)
            renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def wide():
    """A base whose attention heads are as wide as real ones, with as many blocks as heads."""
    narrow = dict(SD3_PARTS["transformer"])
    SD3_PARTS["transformer"].update(num_layers=2, attention_head_dim=64, caption_projection_dim=128)
    try:
        return build_tiny_sd3()
    finally:
        SD3_PARTS["transformer"].update(narrow)


@pytest.mark.parametrize(("kind", "condition"), [(None, None), (0, "blur"), (1, "canny"), (2, "depth_midas")])
def test_a_file_of_stability(wide, image, kind, condition, tmp_path):
    network = network_of_stability(wide)
    tensors = stability_names(network)
    if kind is not None:
        tensors["control_type"] = torch.tensor(float(kind))
    save_file(tensors, tmp_path / "sd3.5_large_controlnet.safetensors")
    control = load_control(tmp_path / "sd3.5_large_controlnet.safetensors", wide)
    assert control.condition == condition
    of_conditions = {"canny": STABILITY_CANNY_PIXELS, "depth_midas": STABILITY_DEPTH_PIXELS}
    assert control.pixels == of_conditions.get(condition, USUAL_PIXELS)
    own = control.network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in network.state_dict().items())
    assert torch.equal(own["pos_embed.proj.weight"], wide.transformer.pos_embed.proj.weight)
    # As ComfyUI's load_controlnet_sd35 passes them on; its autoencoder is given depth as 2 x - 1 after that.
    pixels = {"canny": image * 255 * 0.5 + 0.5, "depth_midas": (1 - image) * 2 - 1}.get(condition, image * 2 - 1)
    assert torch.allclose(control.encode(image, wide), wide.encode_image(pixels), atol=1e-5)
    with refused("missing-setting", "--base"):
        load_control(tmp_path / "sd3.5_large_controlnet.safetensors")
    assert describe(tmp_path / "sd3.5_large_controlnet.safetensors")["layout"] == "original"


@pytest.mark.parametrize(
    ("condition", "said", "pixels"),
    [("canny", "127.5", STABILITY_CANNY_PIXELS), ("depth_zoe", "near in white", STABILITY_DEPTH_PIXELS)],
)
def test_a_folder_of_stability_is_converted_with_its_input_range(wide, condition, said, pixels, tmp_path):
    network_of_stability(wide).save_pretrained(tmp_path / "cn")
    made = convert(
        tmp_path / "cn",
        tmp_path / "c.safetensors",
        to="controlkit",
        base=str(saved_pipeline(wide, tmp_path / "base")),
        condition=condition,
    )
    assert any(said in note for note in made.notes)
    assert load_control(tmp_path / "c.safetensors", wide).pixels == pixels


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", ControlNetSD3.for_base(base), base)
    tensors = load_file(path)
    tensors.pop("controlnet_blocks.1.bias")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "controlnet_blocks.1.bias"):
        load_control(path, base)


def test_it_moves_to_another_model_of_its_family(base, image):
    other = build_tiny_sd3(seed=7)
    control = trained(ControlNetSD3.for_base(base))
    moved, _ = transfer(control, base, other)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.allclose(moved.network.state_dict()[name], other.transformer.state_dict()[name], atol=1e-6)
    assert moved.incompatibility(other) is None and not torch.equal(moved.encode(image, other), image)


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of Stable Diffusion 3", "UNet2DConditionModel"):
        ControlNetSD3.for_base(tiny_base)
    control = ControlNetSD3.for_base(base)
    path = save_control(tmp_path / "mine.safetensors", control, base)
    with refused("incompatible", path, "transformer of Stable Diffusion 3"):
        load_control(path, tiny_base)
    control.base_layers = 24
    assert control.incompatibility(base) == "its blocks of the base: 24, the base's: 3"


def test_one_for_inpainting_is_refused(base, tmp_path):
    network = SD3ControlNetModel.from_config(
        {**ControlNetSD3.for_base(base).config(), "extra_conditioning_channels": 1}
    )
    network.save_pretrained(tmp_path / "cn")
    with refused("incompatible", "inpainting mask"):
        load_control(tmp_path / "cn", base)


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_an_image_of_another_size_is_refused(base, size):
    with refused("wrong-size", "60"):
        ControlNetSD3.for_base(base).encode(torch.zeros(1, 3, *size), base)


# From the command line


def test_it_is_trained_resumed_and_used(folder, tmp_path):
    check_training(folder, tmp_path, system="controlnet-sd3")


def test_own_settings_come_back_from_diffusers_folder_and_are_noted(base, tmp_path):
    control = ControlNetSD3.for_base(base)
    control.pixels = STABILITY_CANNY_PIXELS
    file = save_control(tmp_path / "mine.safetensors", control, base)
    made = convert(file, tmp_path / "folder", "diffusers")
    (note,) = made.notes
    assert "pixels" in note
    assert "pixels" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    assert load_control(tmp_path / "folder", base).config() == control.config()
