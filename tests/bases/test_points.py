"""Points and sites of a base are where diffusers' own UNet has the hidden states that they name."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

import tiny
from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.load import load_base
from controlkit.bases.residuals import Residuals
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.taps import Tap
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from refusals import refused

_SMALL = {"sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 16}


def small(name, **changes):
    """A UNet with the blocks of a known base, and few channels."""
    torch.manual_seed(3)
    return UNet2DConditionModel(**{**KNOWN_BASES[name][1]["unet"], **_SMALL, **changes}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bases(tiny_base):
    """Stable Diffusion 1.5's and XL's order of blocks, and nano itself."""
    parts = {key: getattr(tiny_base, key) for key in ("tokenizer", "text_encoder", "vae")}
    xl = {"attention_head_dim": [2, 4, 4], "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36}
    unets = {
        "sd15": small("sd15", block_out_channels=(16, 24, 32, 32), attention_head_dim=4),
        "sdxl": small("sdxl", block_out_channels=(16, 24, 32), transformer_layers_per_block=[1, 1, 2], **xl),
    }
    made = {
        name: StableDiffusion(name=name, **parts, unet=unet, scheduler_config=tiny.SD1_SCHEDULE)
        for name, unet in unets.items()
    }
    return {**made, "nano": load_base("nano")}


def inputs(base):
    generator = torch.Generator().manual_seed(0)
    width = base.unet.config.cross_attention_dim
    text = Text(torch.randn(2, 5, width, generator=generator))
    if base.unet.config.addition_embed_type:
        text = Text(text.tokens, pooled=torch.randn(2, 12, generator=generator), time_ids=torch.full((2, 6), 64.0))
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([900, 100]), text


def streams_of_diffusers(base, monkeypatch):
    """What its UNet has at each point, from what its blocks take and give and from what it concatenates."""
    found = {}
    unet = base.unet
    skips, decoder, handles = [], [], []

    def keep(name, module, before=False):
        def hook(_module, args, kwargs, *output):
            value = (args[0] if args else kwargs["hidden_states"]) if before else output[0]
            found[name] = (value[0] if isinstance(value, tuple) else value).clone()

        register = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(register(hook, with_kwargs=True))

    keep("conv_in", unet.conv_in)
    keep("middle", unet.mid_block)
    keep("middle.in", unet.mid_block, before=True)
    keep("time", unet.time_embedding)
    attentions = []
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):  # its second norm reads what self-attention has been added to
            handles.append(block.norm2.register_forward_pre_hook(lambda _m, args: attentions.append(args[0].clone())))
    for block in unet.down_blocks:
        handles.append(block.register_forward_hook(lambda _m, _a, output: skips.extend(output[1])))
    concatenate = torch.cat

    def recording(tensors, *args, **kwargs):
        if kwargs.get("dim") == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            decoder.append(tensors)
        return concatenate(tensors, *args, **kwargs)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch, "cat", recording)
        x_t, t, text = inputs(base)
        unet(x_t, t, **unet_inputs(text))
    for handle in handles:
        handle.remove()
    found |= {f"attention.{place}": stream for place, stream in enumerate(attentions)}
    outputs = [found.pop("conv_in"), *skips]
    for place, output in enumerate(outputs):
        found[f"encoder.{place}"] = output
        found[f"encoder.{place}.in"] = outputs[place - 1] if place else x_t
    for place, (stream, skip) in enumerate(decoder):
        assert torch.equal(skip, outputs[-1 - place])
        found[f"decoder.{place}"] = stream
    return found


@pytest.mark.parametrize("name", ["sd15", "sdxl", "nano"])
def test_every_point_sees_the_hidden_states_that_diffusers_unet_has_there(bases, name, monkeypatch):
    base = bases[name]
    expected = streams_of_diffusers(base, monkeypatch)
    blocks = sum(point.startswith("encoder.") for point in expected) // 2
    assert sum(point.startswith("decoder.") for point in base.points) == blocks
    assert {"encoder.0.in", f"encoder.{blocks - 1}", "middle.in", "middle", "decoder.0"} <= set(base.points)
    seen = {}
    taps = {point: [Tap(function=lambda stream, at=point: seen.update({at: stream}))] for point in base.points}
    with torch.no_grad():
        base.predict(*inputs(base), taps=taps)
    assert set(seen) == set(base.points)
    for point, stream in seen.items():
        assert torch.equal(stream, expected[point]), point


@pytest.mark.parametrize("name", ["sd15", "sdxl", "nano"])
def test_what_a_tap_adds_is_what_the_rest_of_the_network_sees(bases, name):
    """And a residual of a site that is a point as well is the same as a tap there."""
    base = bases[name]
    x_t, t, text = inputs(base)
    with torch.no_grad():
        plain = base.predict(x_t, t, text)
        for point in list(base.points)[::3]:
            made = base.predict(x_t, t, text, taps={point: [Tap(function=lambda stream: stream.sin())]})
            assert (made - plain).abs().max() > 1e-4, point
        for site in [site for site in base.sites if site in base.points][::3]:
            channels, pixels = base.sites[site]
            residual = torch.randn(2, channels, base.factor * 16 // pixels, base.factor * 16 // pixels)
            tapped = base.predict(x_t, t, text, taps={site: [Tap(function=lambda _stream, own=residual: own)]})
            added = base.predict(x_t, t, text, Residuals({site: residual}))
            assert (tapped - added).abs().max() < 1e-5, site


@pytest.mark.parametrize("name", ["sd15", "sdxl", "nano"])
def test_every_site_takes_a_residual_of_its_shape_whatever_the_others_get(bases, name):
    base = bases[name]
    x_t, t, text = inputs(base)
    with torch.no_grad():
        plain = base.predict(x_t, t, text)
        for site, (channels, pixels) in list(base.sites.items())[::2]:
            side = base.factor * 16 // pixels
            zero = base.predict(x_t, t, text, Residuals({site: torch.zeros(1, channels, side, side)}))
            assert (zero - plain).abs().max() < 1e-5, site
            made = base.predict(x_t, t, text, Residuals({site: torch.ones(1, channels, side, side)}))
            assert (made - plain).abs().max() > 1e-4, site


def test_sites_and_points_that_a_base_lacks_are_refused_in_words(tiny_base):
    x_t, t, text = torch.zeros(1, 4, 16, 16), torch.tensor([1]), Text(torch.zeros(1, 3, 16))
    with refused("incompatible", "tiny", "'skip.9'", "skip.0, ", "middle"):
        tiny_base.predict(x_t, t, text, Residuals({"skip.9": torch.zeros(1, 4, 8, 8)}))
    with refused("incompatible", "'block.3'", "encoder.0.in"):
        tiny_base.predict(x_t, t, text, taps={"block.3": [Tap(function=torch.sin)]})
    with pytest.raises(ValueError, match=r"a tap at middle got \(1, 32, 8, 8\) and returned another shape, \(1, 1,"):
        tiny_base.predict(x_t, t, text, taps={"middle": [Tap(function=lambda stream: stream[:, :1])]})


def test_residuals_are_a_mapping_from_sites():
    made = Residuals.numbered("skip", [torch.ones(2, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)], middle=torch.zeros(1))
    assert list(made) == ["skip.0", "skip.1", "middle"] and len(made) == 3
    assert "skip.1" in made and "skip.2" not in made and made.get("skip.2") is None
    assert dict(made.items())["skip.1"] is made["skip.1"]
    assert made.batch == 2 and Residuals().batch == 0
    with pytest.raises(KeyError):
        made["stage.0"]
    total = made + Residuals({"skip.1": torch.ones(1), "stage.0": torch.ones(1)})
    assert list(total) == ["skip.0", "skip.1", "middle", "stage.0"] and total["skip.1"].item() == 4
    assert [tensor.flatten()[0].item() for tensor in made.scaled([2, 3, 4]).tensors()] == [2, 9, 0]
