"""ControlNet-LLLite: equality with kohya's order of operations, kohya's names, training, errors."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.bases.meta import meta_base
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.controlnet_lllite import ControlNetLLLite
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from controlkit.training.memory import checkpoint_activations
from refusals import refused
from tiny import build_tiny_flux, build_tiny_sdxl

PROMPT = "red apple"


@pytest.fixture(scope="module")
def nano():
    return load_base("nano")


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(base, seed=1, **options):
    """A control whose last layers are as after training."""
    torch.manual_seed(seed)
    control = ControlNetLLLite.for_base(base, "canny", cond_emb_dim=8, mlp_dim=12, **options)
    for name, parameter in control.network.named_parameters():
        if ".up." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return control.eval().requires_grad_(False)


def ours(base, *uses, **changes):
    settings = {"prompt": PROMPT, "seeds": (3, 11), "steps": 3, "guidance": 3.0}
    return torch.cat(list(sample(base, uses=uses, **{**settings, **changes})))


def as_kohya_computes(base, tensors, x_t, t, text, condition_image):
    """The base's prediction with kohya's `LLLiteModule.forward` around its layers, from the tensors of a file."""
    unet, handles = base.unet, []
    by_layer = {}
    for name, value in tensors.items():
        layer, _, rest = name.partition(".")
        by_layer.setdefault(layer, {})[rest] = value

    def changed(parts):
        cx = condition_image * 2 - 1
        places = sorted({int(rest.split(".")[1]) for rest in parts if rest.startswith("conditioning1")})
        for place in places:
            weight = parts[f"conditioning1.{place}.weight"]
            cx = torch.nn.functional.conv2d(
                cx.relu() if place else cx, weight, parts[f"conditioning1.{place}.bias"], stride=weight.shape[-1]
            )
        cx = cx.flatten(2).permute(0, 2, 1)

        def hook(module, inputs):
            (x,) = inputs
            down = torch.nn.functional.linear(x, parts["down.0.weight"], parts["down.0.bias"]).relu()
            mid = torch.cat([cx.expand(len(x), -1, -1), down], 2)
            mid = torch.nn.functional.linear(mid, parts["mid.0.weight"], parts["mid.0.bias"]).relu()
            return (x + torch.nn.functional.linear(mid, parts["up.0.weight"], parts["up.0.bias"]),)

        return hook

    per_block = unet.config["layers_per_block"] + 1
    for layer, parts in by_layer.items():
        found = re.fullmatch(
            r"lllite_unet_(input_blocks_(\d+)|middle_block)_1_transformer_blocks_(\d+)_(attn\d)_to_(.)", layer
        )
        block = "mid_block.attentions.0"
        if found[2]:
            block = f"down_blocks.{(int(found[2]) - 1) // per_block}.attentions.{(int(found[2]) - 1) % per_block}"
        path = f"{block}.transformer_blocks.{found[3]}.{found[4]}.to_{found[5]}"
        handles.append(unet.get_submodule(path).register_forward_pre_hook(changed(parts)))
    try:
        return base.predict(x_t, t, text)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("build", [lambda: load_base("nano"), build_tiny_sdxl])
def test_predictions_are_those_of_kohya(build, tmp_path):
    base = build()
    side = base.size
    condition_image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    control = trained(base)
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    torch.manual_seed(4)
    latent = side // base.factor
    x_t, t = torch.randn(2, base.latent_channels, latent, latent), torch.tensor([500, 20])
    text = base.encode_text([PROMPT, "blue"])
    expected = as_kohya_computes(base, load_file(path), x_t, t, text, condition_image)
    hint = {name: value.expand(2, -1, -1) for name, value in control.encode(condition_image, base).items()}
    assert torch.allclose(predict_under(control, base, x_t, t, text, hint), expected, atol=1e-4)
    assert not torch.allclose(expected, base.predict(x_t, t, text), atol=0.01)


def test_a_weight_scales_what_is_added(nano, image):
    control, half = trained(nano), trained(nano)
    for name, parameter in half.network.named_parameters():
        if ".up." in name:
            parameter.mul_(0.5)
    hint = control.encode(image, nano)
    plain, whole = ours(nano), ours(nano, ActiveControl(control, hint))
    assert (whole - plain).abs().max() > 0.02
    halved = (ours(nano, ActiveControl(one, hint, weight=weight)) for one, weight in ((control, 0.5), (half, 1.0)))
    assert torch.allclose(*halved, atol=1e-4)
    assert torch.equal(ours(nano, ActiveControl(control, hint, weight=0.0)), plain)


def test_two_of_them_and_one_on_a_branch(nano, image):
    first, second = trained(nano), trained(nano, seed=2)
    hints = [control.encode(image, nano) for control in (first, second)]
    both = ours(nano, ActiveControl(first, hints[0]), ActiveControl(second, hints[1]))
    for alone in (ActiveControl(first, hints[0]), ActiveControl(second, hints[1])):
        assert (both - ours(nano, alone)).abs().max() > 1e-3
    one, two = (ours(nano, ActiveControl(first, hints[0], conditional_only=each)) for each in (True, False))
    assert (one - two).abs().max() > 1e-3


def test_layers_of_a_decoder_that_another_control_replaces(tiny_base):
    """kohya's files may have layers in the decoder; an unlocked ControlNet runs its own decoder."""
    unlocked = ControlNet.for_base(tiny_base, sd_locked=False).requires_grad_(False)
    place = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = tiny_base.unet.get_submodule(place).in_features
    levels = len(tiny_base.unet.config["down_block_types"])
    torch.manual_seed(3)
    control = ControlNetLLLite(
        {place: (width, levels)},
        cond_emb_dim=4,
        mlp_dim=4,
        layers_per_block=tiny_base.unet.config["layers_per_block"],
        factor=tiny_base.factor,
    ).requires_grad_(False)
    with tiny_base.replacing(unlocked.replacements()):
        layer = tiny_base.unet.get_submodule(place)
        layer.weight.mul_(3)
    x_t, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    text, side = tiny_base.encode_text([PROMPT]), tiny_base.size
    hint = control.encode(torch.rand(1, 3, side, side), tiny_base)
    taps = {name: [tap] for name, tap in control.taps(tiny_base, x_t, t, text, hint).items()}
    network, embedded = control.network[control._name(place)], hint[place]

    def before(module, inputs):
        (x,) = inputs
        return (x + network.up(network.mid(torch.cat([embedded, network.down(x)], 2))),)

    with tiny_base.replacing(unlocked.replacements()):
        made = tiny_base.predict(x_t, t, text, taps=taps)
        handle = layer.register_forward_pre_hook(before)
        expected = tiny_base.predict(x_t, t, text)
        handle.remove()
        assert not torch.allclose(expected, tiny_base.predict(x_t, t, text), atol=1e-3)
    assert torch.allclose(made, expected, atol=1e-5)


def test_a_new_one_leaves_the_base_as_it_is(nano, image):
    control = ControlNetLLLite.for_base(nano).eval()
    assert torch.equal(ours(nano, ActiveControl(control, control.encode(image, nano))), ours(nano))
    with refused("out-of-range", "cond_emb_dim is 7"):
        ControlNetLLLite.for_base(nano, cond_emb_dim=7)
    with refused("out-of-range", "mlp_dim is 0"):
        ControlNetLLLite.for_base(nano, mlp_dim=0)


def test_a_new_one_for_sdxl_has_the_layers_of_kohyas():
    """136 modules, as kohya's script prints; 22,969,600 parameters by its sizes."""
    with torch.device("meta"):
        control = ControlNetLLLite.for_base(meta_base("sdxl"))
    assert len(control.layers) == 136
    assert control.parameter_counts() == {"parameters": 22_969_600}
    names = {name.partition(".")[0] for name in control.file_state()}
    assert {
        "lllite_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_v",
        "lllite_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_q",
        "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_k",
    } < names
    assert {name.split("_1_")[0] for name in names} == {
        f"lllite_unet_{place}" for place in ("input_blocks_4", "input_blocks_5", "input_blocks_7", "input_blocks_8")
    } | {"lllite_unet_middle_block"}


def test_gradients_are_the_same_with_checkpointing(image):
    gradients = []
    for checkpointed in (False, True):
        base = load_base("nano")
        control = trained(base).requires_grad_(True).train()
        if checkpointed:
            base.unet.train()
            checkpoint_activations(base, control)
        torch.manual_seed(1)
        x_t, text = torch.randn(1, 4, 16, 16), base.encode_text([PROMPT])
        predict_under(
            control, base, x_t, torch.tensor([300]), text, control.encode(image, base)
        ).square().sum().backward()
        gradients.append([parameter.grad for parameter in control.parameters()])
    assert all(
        first is not None and torch.allclose(first, second, rtol=1e-3, atol=1e-5)
        for first, second in zip(*gradients, strict=True)
    )


# Files


def test_it_is_saved_and_loaded(nano, image, tmp_path):
    control = trained(nano)
    path = save_control(tmp_path / "mine.safetensors", control, nano, dtype=torch.float32)
    loaded = load_control(path, nano)
    assert loaded.condition == "canny" and loaded.config() == control.config()
    made = [ours(nano, ActiveControl(one, one.encode(image, nano))) for one in (control, loaded)]
    assert torch.equal(*made)
    assert describe(path)["layers"] == str(len(control.layers))
    assert read_metadata(path)["modelspec.architecture"].endswith("/control-net-lllite")


def test_shapes_tell_the_config_of_kohyas_file(tmp_path):
    with torch.device("meta"):
        control = ControlNetLLLite.for_base(meta_base("sdxl"), cond_emb_dim=4, mlp_dim=2)
    state = {name: torch.zeros(value.shape) for name, value in control.file_state().items()}
    save_file(state, tmp_path / "kohya.safetensors")
    loaded = load_control(tmp_path / "kohya.safetensors")
    assert isinstance(loaded, ControlNetLLLite) and loaded.config() == control.config()
    assert loaded.incompatibility(meta_base("sdxl")) is None


@pytest.mark.parametrize("layer", ["input_blocks_4_1_transformer_blocks_0_ff_net_2", "input_blocks_1_0_in_layers_2"])
def test_files_on_other_layers_are_refused(layer, tmp_path):
    """Networks before feed-forward layers and convolutions, which kohya's script can make."""
    name, path = f"lllite_unet_{layer}", tmp_path / "other.safetensors"
    save_file({f"{name}.conditioning1.0.weight": torch.zeros(2, 3, 4, 4)}, path)
    with refused("damaged-file", path, name, "query, key and value"):
        load_control(path)


def test_a_bare_file_is_read_as_of_the_base_it_is_used_with(nano, image, tmp_path):
    """Whose number of layers in a block it does not tell."""
    control = trained(nano)
    path = save_control(tmp_path / "mine.safetensors", control, nano, dtype=torch.float32)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    loaded = load_control(tmp_path / "bare.safetensors", nano)
    assert loaded.config() == control.config()


def test_a_file_without_its_first_layer_is_refused(nano, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", trained(nano), nano)
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("down.0.weight"))
    tensors.pop(lost)
    save_file(tensors, tmp_path / "bare.safetensors")
    with refused("damaged-file", tmp_path / "bare.safetensors", f"lacks {lost}"):
        load_control(tmp_path / "bare.safetensors", nano)


def test_a_config_with_absurd_sizes_is_refused(nano):
    config = trained(nano).config()
    path = next(iter(config["layers"]))
    config["layers"][path] = [96, 10**9]
    with pytest.raises(ValueError, match="from 1 to 8"):
        ControlNetLLLite.from_config(config)


def test_a_damaged_file_is_refused(nano, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", trained(nano), nano)
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("mid.0.bias"))
    tensors.pop(lost)
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, lost):
        load_control(path, nano)


# Errors


def test_it_says_which_base_it_needs(nano, tmp_path):
    with refused("incompatible", "UNet"):
        ControlNetLLLite.for_base(build_tiny_flux())
    path = save_control(tmp_path / "mine.safetensors", trained(nano), nano)
    with refused("incompatible", path, "its channels of down_blocks.1", "the base's: 32"):
        load_control(path, build_tiny_sdxl())


@pytest.mark.parametrize(
    ("change", "said"), [("only_cross_attention", "no self-attention"), ("layers_per_block", "layers")]
)
def test_unusual_unets_are_refused(tiny_base, change, said):
    base, control = copy.deepcopy(tiny_base), trained(tiny_base)
    base.unet.register_to_config(**{change: True if change == "only_cross_attention" else (1, 1)})
    with refused("incompatible", base.name, said):
        ControlNetLLLite.for_base(base)
    assert said in control.incompatibility(base)


def test_sizes_that_do_not_fit(nano):
    control = trained(nano)
    with refused("wrong-size", "multiples of 16", "68 and 64", "try 64 and 64"):
        control.encode(torch.zeros(1, 3, 64, 68), nano)


def test_it_is_trained_and_used_by_the_command_line(icons_file, tmp_path):
    recipe = {"system": "controlnet-lllite", "icons": str(icons_file), "condition": "canny", "name": "mine"}
    recipe |= {"out": str(tmp_path / "run"), "steps": 2, "batch_size": 2}
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {value}" for name, value in recipe.items()))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    (path,) = (tmp_path / "run").glob("mine.safetensors")
    tensors = load_file(path)
    assert any(value.abs().max() > 0 for name, value in tensors.items() if name.endswith("up.0.weight"))
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(photo)
    out = tmp_path / "out"
    assert main(["generate", PROMPT, "--control", f"{path}={photo}", "--steps", "1", "--out", str(out)]) == 0
    assert (out / "seed0.png").is_file()
