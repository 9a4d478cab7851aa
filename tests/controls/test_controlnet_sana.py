"""ControlNet of Sana: parity with diffusers' pipeline, files, training, errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaControlNetModel, SanaControlNetPipeline
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.bases.meta import meta_base
from controlkit.controls.controlnet_sana import ControlNetSana
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from refusals import refused
from tiny import build_tiny_sana, parts_of, saved_pipeline

PROMPTS = ("cat", "Red apple on a blue table")
SEEDS = (3, 11)


@pytest.fixture(scope="module")
def base():
    return build_tiny_sana()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "sana")


def trained(control, seed=1):
    """The control with zero-initialised layers as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in control.named_parameters():
        if "controlnet_" in name or "input_block" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return control.eval().requires_grad_(False)


def theirs(base, control, image, **settings):
    pipeline = SanaControlNetPipeline(**parts_of(base), controlnet=control.network)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 4.0, "negative_prompt": "dog", "width": 64, "height": 64, **settings}
    return pipeline(
        list(PROMPTS),
        control_image=image.repeat(2, 1, 1, 1) * 2 - 1,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        use_resolution_binning=False,
        output_type="pt",
        **settings,
    ).images


def ours(base, *uses, **changes):
    settings = {"seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "dog", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=PROMPTS, uses=uses, **{**settings, **changes})))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_diffusers(base, image, layers, guidance):
    control = trained(ControlNetSana.for_base(base, num_layers=layers))
    expected = theirs(base, control, image, controlnet_conditioning_scale=0.7, guidance_scale=guidance)
    use = ActiveControl(control, control.encode(image, base), weight=0.7)
    assert (ours(base, use, guidance=guidance) - expected).abs().max() < 1e-4
    assert (ours(base, guidance=guidance) - expected).abs().max() > 0.01


@pytest.mark.parametrize("layers", [1, 3])
def test_a_new_one_copies_the_base_and_leaves_it_unchanged(base, image, layers):
    control = ControlNetSana.for_base(base, num_layers=layers).eval()
    own = control.network.state_dict()
    shared = own.keys() & base.transformer.state_dict().keys()
    assert own.keys() - shared == {name for name in own if name.startswith(("input_block.", "controlnet_blocks."))}
    assert all(torch.equal(own[name], base.transformer.state_dict()[name]) for name in shared)
    assert torch.equal(ours(base, ActiveControl(control, control.encode(image, base))), ours(base))


def test_numbers_of_blocks_are_checked_and_bounded_by_the_base(base):
    assert ControlNetSana.for_base(base, num_layers=9).network.config.num_layers == 3
    with refused("out-of-range", "num_layers is 0"):
        ControlNetSana.for_base(base, num_layers=0)
    with refused("incompatible", "two blocks or more"):
        ControlNetSana.for_base(build_tiny_sana(num_layers=1))


@pytest.mark.parametrize(
    ("changes", "said"), [({"qk_norm": "rms_norm_across_heads"}, "qk_norm"), ({"timestep_scale": 2.0}, "2.0")]
)
def test_bases_whose_network_controls_do_not_have_are_refused(base, changes, said):
    other = build_tiny_sana(**changes)
    with refused("incompatible", said, other.name):
        ControlNetSana.for_base(other)
    assert said in ControlNetSana.for_base(base).incompatibility(other)


def test_a_new_one_for_sana_has_the_size_of_the_released():
    with torch.device("meta"):
        control = ControlNetSana.for_base(meta_base("sana-1600m"))
        released = SanaControlNetModel()  # diffusers' defaults
    assert control.parameter_counts() == {"parameters": sum(value.numel() for value in released.parameters())}


def test_it_is_weighted_by_layer_and_mask(base, image):
    control = trained(ControlNetSana.for_base(base))
    hint = control.encode(image, base)
    whole, none = torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)

    def masked(mask, **settings):
        return ours(base, ActiveControl.in_mode("control", base, control=control, hint=hint, mask=mask, **settings))

    assert torch.equal(masked(none), ours(base)) and torch.equal(masked(None, layers=[0] * 3), ours(base))
    assert torch.equal(masked(whole), masked(None, layers=[1] * 3))
    left = none.clone()
    left[..., :32] = 1
    assert not torch.allclose(masked(left), masked(whole), atol=1e-3)


# Files


def same(base, first, second, image):
    return torch.equal(*(ours(base, ActiveControl(one, one.encode(image, base))) for one in (first, second)))


def test_it_is_saved_and_loaded(base, image, tmp_path):
    control = trained(ControlNetSana.for_base(base, condition="hed", num_layers=2))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "hed" and same(base, control, loaded, image)
    assert describe(path)["blocks"] == "2"


def test_one_with_positions_is_saved_loaded_and_told_from_others(base, image, tmp_path):
    """As of Sana for larger images."""
    other = build_tiny_sana(interpolation_scale=1.0)
    control = trained(ControlNetSana.for_base(other))
    path = save_control(tmp_path / "mine.safetensors", control, other, dtype=torch.float32)
    assert same(other, control, load_control(path, other), image)
    assert (ours(other, ActiveControl(control, control.encode(image, other)))).isfinite().all()
    convert(path, tmp_path / "folder", to="diffusers")
    assert same(other, control, load_control(tmp_path / "folder", other), image)
    with refused("incompatible", path, "interpolation scale: 1.0, the base's: None"):
        load_control(path, base)
    assert "interpolation scale" in ControlNetSana.for_base(base).incompatibility(other)
    assert "sample size: 8, the base's: 16" in control.incompatibility(
        build_tiny_sana(interpolation_scale=1.0, sample_size=16)
    )


def test_diffusers_folder_is_read_and_written(base, image, tmp_path):
    control = trained(ControlNetSana.for_base(base))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    convert(path, tmp_path / "folder", to="diffusers")
    network = SanaControlNetModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in control.file_state().items())
    network.save_pretrained(tmp_path / "folder")
    assert same(base, control, load_control(tmp_path / "folder", base), image)


def test_shapes_tell_the_config_of_a_bare_file(tmp_path):
    with torch.device("meta"):
        released = SanaControlNetModel(num_layers=1, caption_channels=16)
    made = ControlNetSana.config_of(released.state_dict())
    assert made == {name: released.config[name] for name in made}
    network = SanaControlNetModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        in_channels=8,
        out_channels=8,
    )
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    with refused("damaged-file", tmp_path / "bare.safetensors", "width is 16", "1152 or 2240"):
        load_control(tmp_path / "bare.safetensors")


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", ControlNetSana.for_base(base), base)
    tensors = load_file(path)
    tensors.pop("controlnet_blocks.1.bias")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "controlnet_blocks.1.bias"):
        load_control(path, base)


def test_it_moves_to_another_model_of_its_family(base):
    other = build_tiny_sana(seed=7)
    moved, _ = transfer(trained(ControlNetSana.for_base(base)), base, other)
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.allclose(moved.network.state_dict()[name], other.transformer.state_dict()[name], atol=1e-6)
    assert moved.incompatibility(other) is None


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of Sana", "UNet2DConditionModel"):
        ControlNetSana.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", ControlNetSana.for_base(base), base)
    with refused("incompatible", path, "transformer of Sana"):
        load_control(path, tiny_base)
    with refused("incompatible", path, "after 3 blocks", "the base has 3"):
        load_control(path, build_tiny_sana(num_layers=3))
    with refused("incompatible", path, "mlp ratio: 2.0, the base's: 3.0"):
        load_control(path, build_tiny_sana(mlp_ratio=3.0))


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_an_image_of_another_size_is_refused(base, size):
    with refused("wrong-size", "60"):
        ControlNetSana.for_base(base).encode(torch.zeros(1, 3, *size), base)


# From the command line


def test_it_is_trained_resumed_and_used(folder, tmp_path):
    check_training(folder, tmp_path, system="controlnet-sana", gradient_checkpointing="true")
