"""Fun ControlNets of Qwen-Image and FLUX.2: equality with the originals' order, masked images, files, training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.apps.cli import main
from controlkit.bases.flux import pack, unpack
from controlkit.bases.meta import meta_base
from controlkit.controls import controlnet_flux2_fun, controlnet_qwen_image_fun
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet_flux2_fun import ControlNetFlux2Fun
from controlkit.controls.controlnet_qwen_image_fun import ControlNetQwenImageFun
from controlkit.controls.fun_control import FunControl, FunNetwork
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.images import to_images
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.memory import checkpoint_activations
from refusals import refused
from tiny import build_tiny_flux2, build_tiny_flux2_klein, build_tiny_qwen_image, saved_pipeline

PROMPTS = ("cat", "red apple on a blue table")


def hints_of(network, tokens, image, words, block_of):
    """What the control adds after the base's blocks, by VideoX-Fun's rules."""
    hints, tokens = [], network.blocks[0].before_proj(tokens) + image
    for block in network.blocks:
        words, tokens = block_of(block, tokens, words)
        hints.append(block.after_proj(tokens))
    return hints


def of_qwen_image(base, control, x_t, t, text, condition):
    """The base's prediction in the order of videox_fun/models/qwenimage_transformer2d_control.py: the control's blocks
    run before the base's, on its embedded image and prompt, and an output follows each block that was copied."""
    network, transformer = control.network, base.transformer
    image, prompt = transformer.img_in(pack(x_t)), transformer.txt_in(transformer.txt_norm(text.tokens))
    time = transformer.time_text_embed(t / 1000, image)
    shapes = [[(1, x_t.shape[2] // 2, x_t.shape[3] // 2)]] * len(x_t)
    rotation = transformer.pos_embed(shapes, max_txt_seq_len=prompt.shape[1], device=x_t.device)
    others = (text["mask"], time, rotation)
    hints = hints_of(
        network, network.control_img_in(condition), image, prompt, lambda block, *both: block(*both, *others)
    )
    for place, block in enumerate(transformer.transformer_blocks):
        prompt, image = block(image, prompt, *others)
        if place in network.config.control_layers:
            image = image + hints[network.config.control_layers.index(place)]
    return unpack(transformer.proj_out(transformer.norm_out(image, time)), x_t.shape[2] // 2, x_t.shape[3] // 2)


def of_flux2(base, control, x_t, t, text, condition):
    """As `of_qwen_image`, of videox_fun/models/flux2_transformer2d_control.py."""
    network, transformer = control.network, base.transformer
    image, prompt = transformer.x_embedder(x_t.flatten(2).transpose(1, 2)), transformer.context_embedder(text.tokens)
    time = transformer.time_guidance_embed(t, text["guidance"] * 1000 if base.reads_guidance else None)
    places = torch.cartesian_prod(*(torch.arange(count) for count in (1, x_t.shape[2], x_t.shape[3], 1)))
    words = torch.cartesian_prod(*(torch.arange(count) for count in (1, 1, 1, prompt.shape[1])))
    rotation = transformer.pos_embed(torch.cat([words, places]))
    img, txt = transformer.double_stream_modulation_img(time), transformer.double_stream_modulation_txt(time)
    others = {"temb_mod_img": img, "temb_mod_txt": txt, "image_rotary_emb": rotation}

    def run(block, tokens, words):
        return block(hidden_states=tokens, encoder_hidden_states=words, **others)

    hints = hints_of(network, network.control_img_in(condition), image, prompt, run)
    for place, block in enumerate(transformer.transformer_blocks):
        prompt, image = run(block, image, prompt)
        if place in network.config.control_layers:
            image = image + hints[network.config.control_layers.index(place)]
    both, single = torch.cat([prompt, image], 1), transformer.single_stream_modulation(time)
    for block in transformer.single_transformer_blocks:
        both = block(both, None, temb_mod=single, image_rotary_emb=rotation)
    tokens = transformer.proj_out(transformer.norm_out(both[:, prompt.shape[1] :], time))
    return tokens.transpose(1, 2).unflatten(2, x_t.shape[2:])


def parts_of_qwen_image(kept):
    """The mask at the latent's positions, and zeros for a missing masked image."""
    return kept, torch.zeros(1, 4, 8, 8)


def parts_of_flux2(kept):
    return Flux2Pipeline._patchify_latents(kept), torch.zeros(1, 16, 4, 4)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between the two."""

    build: Callable
    kind: type[FunControl]
    network: type[FunNetwork]
    original: Callable
    parts: Callable
    """The mask at the autoencoder's positions => those of latents, and zeros in place of a masked image."""
    tokens: Callable
    known: str
    places: list[int]
    base_blocks: int
    channels: int
    parameters: int

    @property
    def blocks(self):
        return self.network.family


FAMILIES = {
    "qwen-image": Family(
        build=build_tiny_qwen_image,
        kind=ControlNetQwenImageFun,
        network=controlnet_qwen_image_fun.Network,
        original=of_qwen_image,
        parts=parts_of_qwen_image,
        tokens=pack,
        known="qwen-image",
        places=[0, 12, 24, 36, 48],
        base_blocks=60,
        channels=132,
        parameters=1_756_206_592,
    ),
    "flux2": Family(
        build=build_tiny_flux2,
        kind=ControlNetFlux2Fun,
        network=controlnet_flux2_fun.Network,
        original=of_flux2,
        parts=parts_of_flux2,
        tokens=Flux2Pipeline._pack_latents,
        known="flux2-dev",
        places=[0, 2, 4, 6],
        base_blocks=8,
        channels=260,
        parameters=4_116_248_576,
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family):
    return family.build()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "base")


def trained(base, seed=1, **options):
    """A control with zero-initialised layers as after training."""
    torch.manual_seed(seed)
    kind = next(each.kind for each in FAMILIES.values() if isinstance(base.denoiser, each.kind.transformer))
    control = kind.for_base(base, num_layers=2, **options)
    for name, parameter in control.named_parameters():
        if "_proj." in name and name.split(".")[3] in ("before_proj", "after_proj"):
            torch.nn.init.normal_(parameter, std=0.2)
    return control.eval().requires_grad_(False)


def ours(base, *uses, **changes):
    settings = {"seeds": (3, 11), "steps": 3, "guidance": 4.0, "negative_prompt": "dog", "width": 64, "height": 64}
    return torch.cat(list(sample_prompts(base, prompts=PROMPTS, uses=uses, **{**settings, **changes})))


def noisy(base, rows=2):
    torch.manual_seed(4)
    side = 64 // base.factor
    t = torch.tensor([500.0, 20.0])[:rows]
    return torch.randn(rows, base.latent_channels, side, side), t, base.encode_text(PROMPTS[:rows])


@pytest.mark.parametrize("masked", [False, True])
def test_predictions_are_those_of_the_original_order(family, base, image, masked):
    control = trained(base)
    inputs, mask = {"image": image}, torch.ones(1, 3, 64, 64)
    if masked:
        mask = torch.zeros(1, 3, 64, 64)
        mask[..., 10:50, 20:] = 1
        inputs |= {"original": 1 - image, "mask": mask}
    # videox_fun/pipeline/pipeline_*_control.py
    kept, hidden = family.parts(torch.nn.functional.interpolate(1 - mask[:, :1], (8, 8)))
    if masked:
        hidden = base.encode_image(((1 - image) * 2 - 1) * (mask < 0.5))
    hint = control.encode(inputs, base)
    latents = torch.cat([base.encode_image(image * 2 - 1), kept, hidden], 1)
    assert torch.allclose(hint, family.tokens(latents), atol=1e-6)
    x_t, t, text = noisy(base)
    expected = family.original(base, control, x_t, t, text, hint)
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
    both = ours(base, ActiveControl(first, hints[0]), ActiveControl(second, hints[1]))
    for alone in (ActiveControl(first, hints[0]), ActiveControl(second, hints[1])):
        assert (both - ours(base, alone)).abs().max() > 1e-3


@pytest.mark.parametrize("build", [build_tiny_qwen_image, build_tiny_flux2_klein])
def test_one_on_a_branch_of_guidance(build, image):
    """dev of FLUX.2 has no branches."""
    base = build()
    control = trained(base)
    hint = control.encode(image, base)
    one, both = (ours(base, ActiveControl(control, hint, conditional_only=each)) for each in (True, False))
    assert (one - both).abs().max() > 1e-3 and (one - ours(base)).abs().max() > 1e-3


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


def test_a_new_one_copies_the_base_and_leaves_it_as_it_is(family, base, image):
    control = family.kind.for_base(base, num_layers=2).eval()
    assert control.network.config.control_layers == [0, 2] and control.base_blocks == 4
    state, of_base = control.network.state_dict(), base.transformer.state_dict()
    name = "attn.to_q.weight"
    assert torch.equal(state[f"{family.blocks}.1.{name}"], of_base[f"transformer_blocks.2.{name}"])
    assert torch.equal(ours(base, ActiveControl(control, control.encode(image, base))), ours(base))
    assert family.kind.for_base(base, num_layers=9).network.config.control_layers == [0, 1, 2, 3]
    with refused("out-of-range", "num_layers is 0"):
        family.kind.for_base(base, num_layers=0)


def test_a_new_one_has_the_layout_of_the_released(family):
    """config/*/*_control.yaml of VideoX-Fun."""
    with torch.device("meta"):
        control = family.kind.for_base(meta_base(family.known))
    config = control.config()
    assert config["control_layers"] == family.places and config["control_in_dim"] == family.channels
    assert control.base_blocks == family.base_blocks
    assert [entry.name for entry in control.inputs] == ["image", "original", "mask"]
    assert control.parameter_counts() == {"parameters": family.parameters}


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
    x_t, t, text = noisy(base)
    expected = of_flux2(base, control, x_t, t, text, hint)
    made = predict_under(control, base, x_t, t, text, hint.expand(2, -1, -1))
    assert torch.allclose(made, expected, atol=1e-5)


def test_gradients_are_the_same_with_checkpointing(family, image):
    gradients = []
    for checkpointed in (False, True):
        base = family.build()
        control = trained(base).requires_grad_(True).train()
        if checkpointed:
            base.transformer.train()
            checkpoint_activations(base, control)
            assert control.network.gradient_checkpointing
        x_t, t, text = noisy(base, 1)
        predict_under(control, base, x_t, t, text, control.encode(image, base)).square().sum().backward()
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
def test_shapes_tell_the_config_of_a_bare_file(family, tmp_path, channels):
    network = family.network(family.places, channels, num_attention_heads=1, attention_head_dim=128)
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    control = load_control(tmp_path / "bare.safetensors")
    assert isinstance(control, family.kind) and control.base_blocks == family.base_blocks
    assert control.config() == family.kind._of(network)(network).config()
    assert control.config()["control_layers"] == family.places
    assert len(control.inputs) == (1 if channels == 16 else 3)
    few = family.network([0, 4], channels, num_attention_heads=1, attention_head_dim=128)
    save_file(few.state_dict(), tmp_path / "few.safetensors")
    with refused("damaged-file", "2 blocks", f"known for {len(family.places)}"):
        load_control(tmp_path / "few.safetensors")


def test_a_damaged_file_is_refused(family, base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", trained(base), base)
    tensors, lost = load_file(path), f"{family.blocks}.1.after_proj.bias"
    tensors.pop(lost)
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, lost):
        load_control(path, base)


def test_it_moves_to_another_model_of_its_family(family, base):
    other = family.build(seed=7)
    control = trained(base)
    moved, _ = transfer(control, base, other)
    before, after, name = base.transformer.state_dict(), other.transformer.state_dict(), "attn.to_q.weight"
    made, own = (one.network.state_dict()[f"{family.blocks}.1.{name}"] for one in (moved, control))
    expected = own + after[f"transformer_blocks.2.{name}"] - before[f"transformer_blocks.2.{name}"]
    assert torch.allclose(made, expected, atol=1e-6)


# Errors


def test_it_says_which_base_it_needs(family, base, tiny_base, tmp_path):
    wanted = f"transformer of {family.kind.family_title}"
    with refused("incompatible", wanted, "UNet2DConditionModel"):
        family.kind.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", trained(base), base)
    with refused("incompatible", path, wanted):
        load_control(path, tiny_base)
    wider = family.network([0, 2], 260, num_attention_heads=2, attention_head_dim=16)
    reason = family.kind.class_of({"control_in_dim": 260})(wider, base_blocks=4).incompatibility(base)
    assert reason == "its channels of a token: 260, the base's: 36"


# From the command line


def test_it_is_trained_resumed_and_used(family, folder, tmp_path):
    own = {"system": family.kind.kind, "num_layers": "2", "gradient_checkpointing": "true"}
    check_training(folder, tmp_path, trains="after_proj", **own)
