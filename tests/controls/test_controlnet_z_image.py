"""ControlNet of Z-Image: parity with diffusers' pipeline and the original's order, files, training, errors."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from diffusers import ZImageControlNetInpaintPipeline, ZImageControlNetModel, ZImageControlNetPipeline
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.apps.cli import main
from controlkit.bases.meta import meta_base
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet_z_image import DESIGNS, ControlNetZImage
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.images import to_images
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.memory import checkpoint_activations
from refusals import refused
from tiny import build_tiny_z_image, parts_of, saved_pipeline

PROMPTS = ("cat", "red apple on a blue table, with so many words that it takes more than thirty-two tokens")
SEEDS = (3, 11)
SIZES = {"dim": 32, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2}


@pytest.fixture(scope="module")
def base():
    return build_tiny_z_image()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "z-image")


def network_of(design="1.0", *, channels=4, seed=3):
    torch.manual_seed(seed)
    network = ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0, 1],
        control_in_dim=channels,
        add_control_noise_refiner=DESIGNS[design],
        **SIZES,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def trained(control, seed=1):
    """The control with zero-initialised layers as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in control.named_parameters():
        if "_proj" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return control.eval().requires_grad_(False)


def ours(base, *uses, **changes):
    settings = {"prompts": PROMPTS, "seeds": SEEDS, "steps": 4, "guidance": 4.0, "negative_prompt": "dog"}
    return torch.cat(list(sample_prompts(base, uses=uses, **{**settings, **changes})))


def steered(base, control, image, **changes):
    return ours(base, ActiveControl(control, control.encode(image, base), **changes))


@contextmanager
def refined_by_the_control(base, network):
    """As in the original code, the transformer goes on with the image tokens that the control's refiner has changed;
    diffusers' refines them again without it."""
    refined = {}
    taken = network.control_layers[0].register_forward_pre_hook(lambda _, inputs: refined.update(tokens=inputs[1]))
    forward, last = base.transformer.forward, base.transformer.noise_refiner[-1]

    def with_them(*inputs, **keywords):
        given = last.register_forward_hook(lambda _, __, out: refined["tokens"][:, : out.shape[1]])
        try:
            return forward(*inputs, **keywords)
        finally:
            given.remove()

    base.transformer.forward = with_them
    try:
        yield
    finally:
        del base.transformer.forward
        taken.remove()


def theirs(base, network, condition_image, *, size=(64, 64), scale=0.6, **masked):
    kind = ZImageControlNetInpaintPipeline if masked else ZImageControlNetPipeline
    pipeline = kind(**parts_of(base), controlnet=network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(PROMPTS),
        control_image=condition_image.expand(len(SEEDS), -1, -1, -1) * 2 - 1,
        negative_prompt=["dog"] * len(SEEDS),
        num_inference_steps=4,
        guidance_scale=3.0,
        controlnet_conditioning_scale=scale,
        width=size[0],
        height=size[1],
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **masked,
    ).images


@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
def test_images_are_those_of_diffusers(base, size):
    image = torch.rand(1, 3, size[1], size[0], generator=torch.Generator().manual_seed(1))
    network = network_of()
    control = ControlNetZImage(network, base_layers=4)
    use = ActiveControl(control, control.encode(image, base), weight=0.6)
    made = ours(base, use, width=size[0], height=size[1])
    assert (made - theirs(base, network_of(), image, size=size)).abs().max() < 1e-4
    assert (made - ours(base, width=size[0], height=size[1])).abs().max() > 0.01


@pytest.mark.parametrize("design", ["2.0", "2.1"])
@pytest.mark.parametrize("channels", [4, 9])
def test_later_versions_are_those_of_the_original(base, image, design, channels):
    """With 9 channels as those of Z-Image with 33: condition, mask, and the latent of a masked image."""
    control = ControlNetZImage(network_of(design, channels=channels), base_layers=4)
    made = steered(base, control, image, weight=0.6)
    network = network_of(design, channels=channels)
    alone = theirs(base, network, image)
    with refined_by_the_control(base, network):
        assert (made - theirs(base, network, image)).abs().max() < 1e-4
    assert (made - alone).abs().max() > 1e-3  # diffusers keeps the refiner of the base as it is


def test_a_masked_image_is_that_of_diffusers(base, image):
    original = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 3, 64, 64)
    mask[..., 10:50, 20:] = 1
    control = ControlNetZImage(network_of("2.1", channels=9), base_layers=4)
    inputs = {"image": image, "original": original, "mask": mask}
    made = ours(base, ActiveControl(control, control.encode(inputs, base), weight=0.6))
    network = network_of("2.1", channels=9)
    with refined_by_the_control(base, network):
        expected = theirs(
            base,
            network,
            image,
            image=original.expand(2, -1, -1, -1) * 2 - 1,
            mask_image=mask.expand(2, -1, -1, -1)[:, :1],
        )
    assert (made - expected).abs().max() < 1e-4
    assert (made - steered(base, control, {"image": image}, weight=0.6)).abs().max() > 1e-3
    with refused("contradiction", "original", "mask"):
        control.encode({"image": image, "mask": mask}, base)


def test_a_masked_image_from_the_command_line(base, folder, tmp_path):
    control = ControlNetZImage(network_of("2.1", channels=9), base_layers=4, condition="canny")
    path = save_control(tmp_path / "union.safetensors", control, base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name in ("photo", "mask"):
        (pixels,) = to_images(torch.rand(1, 3, 64, 64, generator=generator))
        pixels.save(tmp_path / f"{name}.png")
    inputs = {"image": "photo.png", "original": "photo.png", "mask": "mask.png"}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    words = ["generate", "cat", "--base", str(folder), "--steps", "2", "--out"]
    made = []
    for source in ("inputs.json", "photo.png"):
        out = tmp_path / source.partition(".")[0]
        assert main([*words, str(out), "--control", f"{path}={tmp_path / source}"]) == 0
        made.append((out / "seed0.png").read_bytes())
    assert made[0] != made[1]


@pytest.mark.parametrize("design", ["1.0", "2.1"])
def test_a_new_one_copies_the_base_and_leaves_it_as_it_is(base, image, design):
    control = ControlNetZImage.for_base(base, num_layers=2, design=design).eval()
    assert control.network.control_layers_places == [0, 2] and control.base_layers == 4
    state, of_base = control.network.state_dict(), base.transformer.state_dict()
    name = "attention.to_q.weight"
    assert torch.equal(state[f"control_layers.1.{name}"], of_base[f"layers.2.{name}"])
    assert torch.equal(state[f"control_noise_refiner.1.{name}"], of_base[f"noise_refiner.1.{name}"])
    assert torch.equal(steered(base, control, image), ours(base))


def test_a_new_one_for_z_image_has_the_size_of_the_first_released():
    base = meta_base("z-image")
    with torch.device("meta"):
        control = ControlNetZImage.for_base(base)
    assert control.parameter_counts() == {"parameters": 1_550_778_368}
    assert control.network.control_layers_places == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("design", DESIGNS)
def test_two_of_them_and_one_on_a_branch(base, image, design):
    first, second = (ControlNetZImage(network_of(design, seed=seed), base_layers=4) for seed in (3, 4))
    uses = [ActiveControl(one, one.encode(image, base), weight=0.4) for one in (first, second)]
    both = ours(base, *uses)
    assert all((both - ours(base, use)).abs().max() > 1e-3 for use in uses)
    on_one = ActiveControl.in_mode("control", base, control=first, hint=first.encode(image, base))
    on_both = ActiveControl(first, first.encode(image, base))
    assert (ours(base, on_one) - ours(base, on_both)).abs().max() > 1e-3
    assert torch.equal(ours(base, on_one, guidance=1.0), ours(base, on_both, guidance=1.0))


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_are_the_same_with_checkpointing(image, design):
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_z_image()
        control = ControlNetZImage(network_of(design), base_layers=4).train().requires_grad_(True)
        if checkpointed:
            base.transformer.train()
            checkpoint_activations(base, control)
        x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        text, hint = base.encode_text(PROMPTS[1:]), control.encode(image, base)
        predict_under(control, base, x_t, torch.tensor([300.0]), text, hint).square().mean().backward()
        gradients.append([parameter.grad for parameter in control.trainable_parameters()])
    assert all(found is not None for found in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-3, atol=1e-6)


# Files


@pytest.mark.parametrize("design", ["1.0", "2.1"])
def test_it_is_saved_and_loaded(base, image, design, tmp_path):
    control = trained(ControlNetZImage.for_base(base, condition="canny", num_layers=3, design=design))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "canny" and loaded.design == design and loaded.base_layers == 4
    assert torch.equal(steered(base, loaded, image), steered(base, control, image))
    facts = describe(path)
    assert facts["design"] == design and facts["layers"] == "3, whose outputs are added after layers 0, 1, 2 of 4"


def test_diffusers_folder_is_read_and_written(base, image, tmp_path):
    control = trained(ControlNetZImage.for_base(base))
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    convert(path, tmp_path / "folder", to="diffusers")
    network = ZImageControlNetModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in control.file_state().items())
    assert torch.equal(steered(base, load_control(tmp_path / "folder", base), image), steered(base, control, image))
    network.save_pretrained(tmp_path / "folder")  # which does not record the layers of the base
    with refused("incompatible", "layers of the base: 30, the base's: 4"):
        load_control(tmp_path / "folder", base)


def released(design, layers, **others):
    """A network of the shape of a released file, but for its width."""
    settings = {**SIZES, "dim": 128, "n_heads": 1, "n_kv_heads": 1, **others}
    network = ZImageControlNetModel(
        control_layers_places=list(range(0, 30, 30 // layers)),
        control_refiner_layers_places=[0, 1],
        control_in_dim=16 if design == "1.0" else 33,
        add_control_noise_refiner=DESIGNS[design],
        **settings,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize(("design", "layers"), [("1.0", 6), ("2.0", 15), ("2.1", 15), ("2.1", 3)])
def test_shapes_tell_the_config_of_a_bare_file(tmp_path, design, layers):
    network = released(design, layers)
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    control = load_control(tmp_path / "bare.safetensors")
    assert isinstance(control, ControlNetZImage) and control.design == design and control.base_layers == 30
    made, kept = control.network.config, set(network.config) - {"_use_default_values"}
    assert {name: str(made[name]).strip("()[],") for name in kept} == {
        name: str(network.config[name]).strip("()[],") for name in kept
    }


def test_unused_layers_of_version_2_0_are_left_out_with_a_note(tmp_path):
    """Its file has refiner layers as that of 2.1, whose `before_proj` is still zero."""
    used, more = released("2.0", 15), released("2.1", 15)
    unused = {name: value for name, value in more.state_dict().items() if name.startswith("control_noise_refiner.")}
    unused |= {name: torch.zeros_like(value) for name, value in unused.items() if "before_proj" in name}
    save_file({**used.state_dict(), **unused}, tmp_path / "union-2.0.safetensors")
    control = load_control(tmp_path / "union-2.0.safetensors")
    assert control.design == "2.0"
    assert all(torch.equal(value, used.state_dict()[name]) for name, value in control.file_state().items())
    notes = convert(tmp_path / "union-2.0.safetensors", tmp_path / "mine.safetensors", to="controlkit").notes
    assert any(f"{len(unused)} tensors" in note for note in notes)
    assert load_control(tmp_path / "mine.safetensors").design == "2.0"


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", ControlNetZImage.for_base(base), base)
    tensors = load_file(path)
    tensors.pop("control_layers.1.after_proj.bias")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "control_layers.1.after_proj.bias"):
        load_control(path, base)


@pytest.mark.parametrize("places", [[1, 2], [0, 4], [0, 2, 1], []])
def test_places_that_do_not_fit_are_refused(base, places):
    config = {**ControlNetZImage.for_base(base).config(), "control_layers_places": places}
    with pytest.raises(ValueError, match="control_layers_places"):
        ControlNetZImage.from_config(config)


@pytest.mark.parametrize("design", ["1.0", "2.1"])
def test_it_moves_to_another_model_of_its_family(base, design):
    other = build_tiny_z_image(seed=7)
    control = trained(ControlNetZImage.for_base(base, num_layers=2, design=design))
    moved, offset = transfer(control, base, other)
    name = "attention.to_q.weight"
    expected = other.transformer.state_dict()[f"layers.2.{name}"]
    assert torch.allclose(moved.network.state_dict()[f"control_layers.1.{name}"], expected, atol=1e-6)
    assert moved.incompatibility(other) is None and offset.moved > offset.kept


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of Z-Image", "UNet2DConditionModel"):
        ControlNetZImage.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", ControlNetZImage.for_base(base), base)
    with refused("incompatible", path, "transformer of Z-Image"):
        load_control(path, tiny_base)
    with refused("incompatible", "layers of the base: 4, the base's: 5"):
        load_control(path, build_tiny_z_image(n_layers=5))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [({"num_layers": 0}, "out-of-range", "num_layers is 0"), ({"design": "2.0"}, "unknown-name", "'2.0'")],
)
def test_options_that_do_not_fit(base, options, code, said):
    with refused(code, said):
        ControlNetZImage.for_base(base, **options)


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_an_image_of_another_size_is_refused(base, size):
    with refused("wrong-size", "60"):
        ControlNetZImage.for_base(base).encode(torch.zeros(1, 3, *size), base)


# From the command line


@pytest.mark.parametrize("design", ["1.0", "2.1"])
def test_it_is_trained_resumed_and_used(folder, design, tmp_path):
    check_training(
        folder,
        tmp_path,
        trains="after_proj",
        system="controlnet-z-image",
        design=f"'{design}'",
        num_layers="2",
        gradient_checkpointing="true",
    )
