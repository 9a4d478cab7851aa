"""Fun ControlNet of FLUX.2: equality with the original's order, masked images, files, training, errors."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.apps.cli import main
from controlkit.bases.meta import meta_base
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet_flux2_fun import ControlNetFlux2Fun, Network
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.images import to_images
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.memory import checkpoint_activations
from refusals import refused
from tiny import build_tiny_flux2, build_tiny_flux2_klein, saved_pipeline

PROMPTS = ("cat", "red apple on a blue table")


@pytest.fixture(scope="module")
def base():
    return build_tiny_flux2()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "flux2")


def trained(base, seed=1, **options):
    """A control with zero-initialised layers as after training."""
    torch.manual_seed(seed)
    control = ControlNetFlux2Fun.for_base(base, num_layers=2, **options)
    for name, parameter in control.named_parameters():
        if "_proj" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return control.eval().requires_grad_(False)


def ours(base, *uses, **changes):
    settings = {"seeds": (3, 11), "steps": 3, "guidance": 4.0, "negative_prompt": "dog", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=PROMPTS, uses=uses, **{**settings, **changes})))


def in_the_original_order(base, control, x_t, t, text, condition, scale):
    """The base's prediction by VideoX-Fun's rules: the control's blocks run before the base's, on its embedded image
    and prompt, and a scaled output follows each block that was copied."""
    network, transformer = control.network, base.transformer
    image, prompt = transformer.x_embedder(x_t.flatten(2).transpose(1, 2)), transformer.context_embedder(text.tokens)
    guidance = text["guidance"] * 1000 if base.reads_guidance else None
    time = transformer.time_guidance_embed(t, guidance)
    places = torch.cartesian_prod(*(torch.arange(n) for n in (1, x_t.shape[2], x_t.shape[3], 1)))
    words = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, prompt.shape[1])))
    rotation = transformer.pos_embed(torch.cat([words, places]))
    img, txt = transformer.double_stream_modulation_img(time), transformer.double_stream_modulation_txt(time)
    others = {"temb_mod_img": img, "temb_mod_txt": txt, "image_rotary_emb": rotation}
    words, tokens, hints = prompt, network.control_img_in(condition), []
    tokens = network.control_transformer_blocks[0].before_proj(tokens) + image
    for block in network.control_transformer_blocks:
        words, tokens = block(hidden_states=tokens, encoder_hidden_states=words, **others)
        hints.append(block.after_proj(tokens))
    for place, block in enumerate(transformer.transformer_blocks):
        prompt, image = block(hidden_states=image, encoder_hidden_states=prompt, **others)
        if place in network.config.control_layers:
            image = image + hints[network.config.control_layers.index(place)] * scale
    both, single = torch.cat([prompt, image], 1), transformer.single_stream_modulation(time)
    for block in transformer.single_transformer_blocks:
        both = block(both, None, temb_mod=single, image_rotary_emb=rotation)
    tokens = transformer.proj_out(transformer.norm_out(both[:, prompt.shape[1] :], time))
    return tokens.transpose(1, 2).unflatten(2, x_t.shape[2:])


@pytest.mark.parametrize("masked", [False, True])
def test_predictions_are_those_of_the_original_order(base, image, masked):
    control = trained(base)
    inputs = {"image": image}
    if masked:
        mask = torch.zeros(1, 3, 64, 64)
        mask[..., 10:50, 20:] = 1
        inputs |= {"original": 1 - image, "mask": mask}
    latents = [base.encode_image(image * 2 - 1), torch.zeros(1, 4, 4, 4), torch.zeros(1, 16, 4, 4)]
    if masked:  # videox_fun/pipeline/pipeline_flux2_control.py
        kept = torch.nn.functional.interpolate(1 - mask[:, :1], (8, 8))
        latents[1] = Flux2Pipeline._patchify_latents(kept)
        latents[2] = base.encode_image(((1 - image) * 2 - 1) * (mask < 0.5))
    hint = control.encode(inputs, base)
    assert torch.allclose(hint, Flux2Pipeline._pack_latents(torch.cat(latents, 1)), atol=1e-6)
    torch.manual_seed(4)
    x_t, t, text = torch.randn(2, 16, 4, 4), torch.tensor([500.0, 20.0]), base.encode_text(PROMPTS)
    expected = in_the_original_order(base, control, x_t, t, text, hint, 1.0)
    made = predict_under(control, base, x_t, t, text, hint.expand(2, -1, -1))
    assert torch.allclose(made, expected, atol=1e-5)
    assert not torch.allclose(made, base.predict(x_t, t, text), atol=0.01)


def test_one_mask_is_shared_by_several_images(base, image):
    control, both = trained(base), torch.cat([image, 1 - image])
    mask = torch.zeros(1, 3, 64, 64)
    mask[..., 20:] = 1
    made = control.encode({"image": both, "original": image, "mask": mask}, base)
    each = [control.encode({"image": one[None], "original": image, "mask": mask}, base) for one in both]
    assert torch.allclose(made, torch.cat(each), atol=1e-5)


def test_a_weight_scales_what_is_added(base, image):
    control = trained(base)
    hint = control.encode(image, base)
    plain, whole, half = ours(base), *(ours(base, ActiveControl(control, hint, weight=each)) for each in (1.0, 0.5))
    assert (whole - plain).abs().max() > (half - plain).abs().max() > 0.005
    assert torch.equal(ours(base, ActiveControl(control, hint, weight=0.0)), plain)


def test_two_of_them_and_one_on_a_branch(base, image):
    first, second = trained(base), trained(base, seed=2)
    hints = [control.encode(image, base) for control in (first, second)]
    both = ours(base, ActiveControl(first, hints[0]), ActiveControl(second, hints[1], conditional_only=True))
    for alone in (ActiveControl(first, hints[0]), ActiveControl(second, hints[1])):
        assert (both - ours(base, alone)).abs().max() > 1e-3


def test_a_masked_image_from_the_command_line(base, folder, tmp_path):
    path = save_control(tmp_path / "union.safetensors", trained(base), base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name in ("photo", "mask"):
        (pixels,) = to_images(torch.rand(1, 3, 64, 64, generator=generator))
        pixels.save(tmp_path / f"{name}.png")
    inputs = {"image": "photo.png", "original": "photo.png", "mask": "mask.png"}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    words = ["generate", "cat", "--base", str(folder), "--steps", "2", "--width", "64", "--height", "64", "--prepared"]
    made = []
    for source in ("inputs.json", "photo.png"):
        out = tmp_path / source.partition(".")[0]
        assert main([*words, "--out", str(out), "--control", f"{path}={tmp_path / source}"]) == 0
        made.append((out / "seed0.png").read_bytes())
    assert made[0] != made[1]
    with refused("contradiction", "original", "mask"):
        trained(base).encode({"image": torch.zeros(1, 3, 64, 64), "mask": torch.zeros(1, 3, 64, 64)}, base)


def test_a_new_one_copies_the_base_and_leaves_it_as_it_is(base, image):
    control = ControlNetFlux2Fun.for_base(base, num_layers=2).eval()
    assert control.network.config.control_layers == [0, 2] and control.base_blocks == 4
    state, of_base = control.network.state_dict(), base.transformer.state_dict()
    name = "attn.to_q.weight"
    assert torch.equal(state[f"control_transformer_blocks.1.{name}"], of_base[f"transformer_blocks.2.{name}"])
    assert torch.equal(ours(base, ActiveControl(control, control.encode(image, base))), ours(base))
    assert ControlNetFlux2Fun.for_base(base, num_layers=9).network.config.control_layers == [0, 1, 2, 3]
    with refused("out-of-range", "num_layers is 0"):
        ControlNetFlux2Fun.for_base(base, num_layers=0)


def test_a_new_one_for_dev_has_the_layout_of_the_released():
    """config/flux2/flux2_control.yaml of VideoX-Fun."""
    with torch.device("meta"):
        control = ControlNetFlux2Fun.for_base(meta_base("flux2-dev"))
    config = control.config()
    assert config["control_layers"] == [0, 2, 4, 6] and config["control_in_dim"] == 260
    assert control.base_blocks == 8 and [entry.name for entry in control.inputs] == ["image", "original", "mask"]
    assert control.parameter_counts() == {"parameters": 4_116_248_576}


@pytest.mark.parametrize("known", ["flux2-klein-4b", "flux2-klein-9b"])
def test_one_is_made_for_klein(known):
    with torch.device("meta"):
        control = ControlNetFlux2Fun.for_base(meta_base(known))
    assert control.incompatibility(meta_base(known)) is None
    assert control.incompatibility(meta_base("flux2-dev")).startswith("its channels: ")


def test_it_acts_on_klein(image):
    base = build_tiny_flux2_klein()
    control = trained(base)
    hint = control.encode(image, base)
    torch.manual_seed(4)
    x_t, t, text = torch.randn(2, 16, 4, 4), torch.tensor([500.0, 20.0]), base.encode_text(PROMPTS)
    expected = in_the_original_order(base, control, x_t, t, text, hint, 1.0)
    made = predict_under(control, base, x_t, t, text, hint.expand(2, -1, -1))
    assert torch.allclose(made, expected, atol=1e-5)
    assert (ours(base, ActiveControl(control, hint)) - ours(base)).abs().max() > 0.005


def test_gradients_are_the_same_with_checkpointing(base, image):
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_flux2()
        control = trained(base).requires_grad_(True).train()
        if checkpointed:
            base.transformer.train()
            checkpoint_activations(base, control)
            assert control.network.gradient_checkpointing
        torch.manual_seed(1)
        x_t, text = torch.randn(1, 16, 4, 4), base.encode_text(["cat"])
        predict_under(
            control, base, x_t, torch.tensor([300.0]), text, control.encode(image, base)
        ).square().sum().backward()
        gradients.append([parameter.grad for parameter in control.parameters()])
    read = [pair for pair in zip(*gradients, strict=True) if pair[0] is not None]
    assert len(read) > 30 and all(torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in read)


# Files


def test_it_is_saved_and_loaded(base, image, tmp_path):
    control = trained(base, condition="canny")
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "canny" and loaded.base_blocks == 4
    made = [ours(base, ActiveControl(one, one.encode(image, base))) for one in (control, loaded)]
    assert torch.equal(*made)
    assert describe(path)["blocks"] == "2, whose outputs are added after blocks 0, 2 of 4"


@pytest.mark.parametrize("channels", [16, 36])
def test_shapes_tell_the_config_of_a_bare_file(tmp_path, channels):
    network = Network([0, 2, 4, 6], channels, num_attention_heads=1, attention_head_dim=128)
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    control = load_control(tmp_path / "bare.safetensors")
    assert isinstance(control, ControlNetFlux2Fun) and control.base_blocks == 8
    assert control.config() == {
        "control_layers": [0, 2, 4, 6],
        "control_in_dim": channels,
        "num_attention_heads": 1,
        "attention_head_dim": 128,
        "mlp_ratio": 3.0,
        "eps": 1e-6,
    }
    assert len(control.inputs) == (1 if channels == 16 else 3)
    few = Network([0, 4], channels, num_attention_heads=1, attention_head_dim=128)
    save_file(few.state_dict(), tmp_path / "few.safetensors")
    with refused("damaged-file", "2 blocks", "known for 4"):
        load_control(tmp_path / "few.safetensors")


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", trained(base), base)
    tensors = load_file(path)
    tensors.pop("control_transformer_blocks.1.after_proj.bias")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "control_transformer_blocks.1.after_proj.bias"):
        load_control(path, base)


def test_it_moves_to_another_model_of_its_family(base):
    other = build_tiny_flux2(seed=7)
    control = trained(base)
    moved, _ = transfer(control, base, other)
    before, after, name = base.transformer.state_dict(), other.transformer.state_dict(), "attn.to_q.weight"
    made, own = (one.network.state_dict()[f"control_transformer_blocks.1.{name}"] for one in (moved, control))
    expected = own + after[f"transformer_blocks.2.{name}"] - before[f"transformer_blocks.2.{name}"]
    assert torch.allclose(made, expected, atol=1e-6)


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of FLUX.2", "UNet2DConditionModel"):
        ControlNetFlux2Fun.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", trained(base), base)
    with refused("incompatible", path, "transformer of FLUX.2"):
        load_control(path, tiny_base)
    wider = Network([0, 2], 260, num_attention_heads=2, attention_head_dim=16)
    reason = ControlNetFlux2Fun.class_of({"control_in_dim": 260})(wider, base_blocks=4).incompatibility(base)
    assert reason == "its channels of a token: 260, the base's: 36"


# From the command line


def test_it_is_trained_resumed_and_used(folder, tmp_path):
    own = {"system": "controlnet-flux2-fun", "num_layers": "2", "gradient_checkpointing": "true"}
    check_training(folder, tmp_path, trains="after_proj", **own)
